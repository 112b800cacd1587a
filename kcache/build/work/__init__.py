"""What builders work with.

- `meter`: inputs under way, and where the time goes
- `progress`: how far a table is
- `refusals`: rows that cannot be stored, and why
- `reasons`: rows that are missing, and why
"""
