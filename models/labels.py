"""What the project's videos show: motions are classes, photographs are captions."""

#: What the picture does, as the viewer sees it ("pan_left": everything moves to the left). The
#: class label of a video is its index here, so the order is a format.
MOTIONS = (
    "pan_left",
    "pan_right",
    "pan_up",
    "pan_down",
    "zoom_in",
    "zoom_out",
    "rotate_cw",
    "rotate_ccw",
    "cut",
    "sprite",
)
#: Subjects of the videos; the caption vector is one-hot over this tuple, so its order is a format.
PHOTOS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "motorcycle",
    "retina",
    "hubble",
    "tissue",
)
