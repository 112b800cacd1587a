"""What pictures are drawn with, and how large; and those that a cache's own rows show.

- `halves`: the networks of a run or a repository
- `originals`: the picture that is drawn onto, with the mask of its hole, or that is drawn by
- `kept`: the pixels of that picture, put back around the hole
- `sizes`: the height and width, by what was trained on
- `scores`: how well what was drawn fits the prompts
- `reconstructions`, `shown`: samples decoded from their rows, beside originals, and those as small pictures
- `strips`: what a run drew, for its report
"""
