"""The command `vmonarch generate`: from a folder of weights and a prompt to a video file."""
