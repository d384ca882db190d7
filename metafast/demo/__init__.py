"""The main job: meta-train a conv net on glyph images, test it on alphabets it has never seen.

`glyphs` is the data set, `eager` the plain PyTorch loop that serves as the yardstick, `train` the job itself,
`console` what the terminal shows, and `plot` the picture at the end.
"""
