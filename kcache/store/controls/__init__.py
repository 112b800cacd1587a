"""Images that go with a picture: hints of what is to be drawn, holes, and how much each part of it counts.

- `given`: such an image as a source gives it
- `packed`: such an image as a row: the bytes of a PNG file, in tokens of a fixed length
"""
