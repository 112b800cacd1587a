"""What a run will take, before anything is loaded.

- `ledger`: memory counted by kind, operation by operation
- `scratch`: what convolutions on a CPU take for themselves
- `rehearsal`: a step of the run without data
"""
