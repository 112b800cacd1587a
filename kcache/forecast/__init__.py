"""What a run will take, known before a weight or a row is read.

- `forecast`: all that is said of it
- `plan`: the run found possible, its steps counted, and its memory
- `largest`: the batch that takes most
- `rehearsal`: a step of the run without data
- `ledger`, `scratch`: memory counted by kind, operation by operation; what convolutions on a CPU take for themselves
- `advice`: flags by which it would fit
"""

from kcache.forecast.advice import Advice
from kcache.forecast.forecast import Forecast, forecast_run

__all__ = ["Advice", "Forecast", "forecast_run"]
