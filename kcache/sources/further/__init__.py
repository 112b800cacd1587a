"""What a source says of a sample beyond its picture and its captions, where that is asked for.

`SourceConfig.controls` and `SourceConfig.counts` say what is asked for, and by which columns.

- `asked`: which settings mean anything for a kind of source
- `beside`: control images that are files, beside pictures or named by metadata
- `numbers`: how much a sample counts and how often it comes
- `fitting`: whether a file of rows has the columns that are asked for
"""
