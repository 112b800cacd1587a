"""Shapes and mirrored pictures in a cache: which of its tables have rows of which samples.

- `wants`: which rows each table has of given samples, and in which order
- `standing`: which samples have which shape, as the index has it
- `choice`: which of a cache's sets of shapes are read
- `held`: which samples are read, and where their rows stand
- `joined`: entries of pictures, and of the mirrored ones behind them, as one array
"""
