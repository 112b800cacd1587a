"""Building and copying on other machines: an engine hands the shards of a plan to whomever it has.

- `engine`: which one a build, or a conversion, was asked for
- `ahead`: the source looked through by a cluster, before a survey does
- `tasks`: what travels between the process that plans and those that encode
- `actor`: one that encodes, wherever it is
- `copier`: one that copies
- `ledger`: what is to be handed out, who has what, and what the lost had
- `cluster`: Ray: joining a cluster or starting one here, and how many actors it has room for
- `crew`: the actors that are there
- `turn`: a table handed out to a crew
- `ray_builder`: a builder that has its plans worked off by actors
- `ray_copier`: a conversion's plan, worked off by actors
"""

from kcache.engines.engine import ahead_of, copying_engine, engine_of

__all__ = ["ahead_of", "copying_engine", "engine_of"]
