"""What is in tars, and which tars are meant.

- `braces`: the tars that a pattern such as {00000..00099}.tar stands for
- `members`: which members are a sample, and what of it each is
- `offers`: what one tar offers, in columns
"""
