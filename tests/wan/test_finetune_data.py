"""Videos for tuning: found with their captions, read at one size and rate, refused by name."""

import csv
import json

import numpy as np
import pytest
from vmonarch_jax.models.wan.finetune.data import (
    Clip,
    check_clips,
    content_hash,
    find_clips,
    packet_times,
    read_clip,
)
from wan_clips import moving_square, write_clips, write_video


def clip_of(path) -> Clip:
    return Clip(path, path.name, "a caption")


def test_captions_beside_videos_and_in_tables(tmp_path):
    write_clips(tmp_path, 3)
    square = moving_square(1)
    for name in ("sub/in_json.gif", "in_csv.gif", "in_jsonl.gif"):
        write_video(tmp_path / name, square)
    (tmp_path / "captions.json").write_text(json.dumps({"sub/in_json": "a", "clip0.mp4": "not"}))
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["video", "prompt"], ["in_csv.gif", 'b, "quoted"']])
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "./in_jsonl.gif", "text": "c"}\n\n')
    (tmp_path / ".hidden.mp4").write_bytes(b"")
    assert {clip.name: clip.caption for clip in find_clips(tmp_path)} == {
        "clip0.mp4": "a red fox runs in snow",
        "clip1.gif": "a blue cat sleeps",
        "clip2": "the dog in rain",
        "in_csv.gif": 'b, "quoted"',
        "in_jsonl.gif": "c",
        "sub/in_json.gif": "a",
    }


def missing(folder):
    (folder / "clip0.txt").unlink()
    (folder / "clip2.txt").write_text(" \n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: [p.unlink() for p in f.glob("*.*")], "got none for clip2; put it beside"),
        (missing, "for each of 3 videos, got none for clip0.mp4, clip2; put it beside the video "),
        (lambda f: (f / "captions.json").write_text('{"gone.mp4": "a"}'), "gone.mp4 (captions.jso"),
        (lambda f: (f / "captions.json").write_text("{"), "captions.json: expected a file name"),
        (lambda f: (f / "captions.json").write_text('{"clip0.mp4": 3}'), "a row without text"),
        (lambda f: (f / "metadata.csv").write_text("a,b\n1,2"), "metadata.csv: expected a file"),
        (lambda f: (f / "clip0.txt").write_bytes(b"\xff\xfe\x00"), "clip0.txt: expected text in"),
    ],
)  # fmt: skip
def test_wrong_folders_say_what_is_wrong(tmp_path, spoil, words):
    spoil(write_clips(tmp_path / "videos", 3))
    with pytest.raises(ValueError) as error:
        find_clips(tmp_path / "videos")
    assert words in str(error.value)


def test_folders_without_videos(tmp_path):
    with pytest.raises(ValueError, match="a folder of videos with captions, got none"):
        find_clips(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ValueError, match=r"expected videos \(.avi, .gif, .*found none"):
        find_clips(tmp_path)


def shown(frames, source):
    """The frame of the source that each frame looks like."""
    apart = np.abs(frames[:, None].astype(int) - source[None].astype(int)).mean((2, 3, 4))
    return apart.argmin(1).tolist()


@pytest.mark.parametrize(
    ("suffix", "fps", "expected"),
    [
        (".mp4", 16, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (".webm", 24, [0, 1, 3, 4, 6, 7, 9, 10, 12]),
        (".mkv", 15, [0, 1, 2, 3, 4, 5, 6, 7, 7]),
        (".gif", 25, [0, 2, 3, 5, 6, 8, 9, 11, 12]),
        ("", 16, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_frames_are_those_nearest_in_time(tmp_path, suffix, fps, expected):
    source = moving_square(13)
    clip = clip_of(write_video(tmp_path / f"clip{suffix}", source, fps))
    check_clips([clip], 9, 16)
    assert shown(read_clip(clip, 9, (56, 40), 16), source) == expected
    if suffix:
        times = packet_times(clip)
        np.testing.assert_allclose(np.diff(times), 1 / fps, atol=6e-3)
        assert len(times) == 13


def test_frames_are_scaled_to_cover_and_cut_in_the_middle(tmp_path):
    video = np.zeros((1, 40, 80, 3), np.uint8)
    video[:, :, 20:60] = 200
    clip = clip_of(write_video(tmp_path / "clip", video))
    frames = read_clip(clip, 1, (16, 16), 16)
    assert frames.shape == (1, 16, 16, 3)
    assert np.abs(frames[:, :, 1:-1].astype(int) - 200).max() < 10


def test_clips_that_do_not_fit_are_all_named(tmp_path):
    good = write_video(tmp_path / "good.mp4", moving_square(9))
    short = write_video(tmp_path / "short.mp4", moving_square(5))
    slow = write_video(tmp_path / "slow.mp4", moving_square(9), 8)
    few = write_video(tmp_path / "few", moving_square(3))
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(good.read_bytes()[:600])
    with pytest.raises(ValueError) as error:
        check_clips([clip_of(p) for p in (good, short, slow, few, damaged)], 9, 16)
    first, *problems = str(error.value).split("\n  ")
    assert first == "expected 9 frames of each of 5 videos, got 4 without:"
    assert problems[0].startswith("short.mp4: expected at least 0.50 seconds (9 frames at 16 a sec")
    assert problems[1].startswith("slow.mp4: expected about 16 frames a second or more, got 8;")
    assert problems[2] == "few: expected at least 9 images, got 3"
    assert problems[3].startswith("damaged.mp4: expected a readable video, got")
    with pytest.raises(ValueError, match=r"short.mp4: expected 9 frames, got 5"):
        read_clip(clip_of(short), 9, (56, 40), 16)


def test_content_decides_the_hash(tmp_path):
    paths = [
        write_video(tmp_path / name, moving_square(3)) for name in ("a.gif", "b.gif", "c", "d")
    ]
    same, other, frames, more = (content_hash(clip_of(path)) for path in paths)
    assert same == other != frames == more
    (tmp_path / "d" / "frame_3.png").write_bytes((tmp_path / "d" / "frame_0.png").read_bytes())
    assert content_hash(clip_of(tmp_path / "d")) != frames
