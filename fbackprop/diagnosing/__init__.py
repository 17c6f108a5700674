"""The health of a training run: what a step's numbers say about it, and fixes that were tried before they are proposed."""

from fbackprop.diagnosing.findings import Finding as Finding
from fbackprop.diagnosing.looks import Look as Look
from fbackprop.diagnosing.record import Health as Health
from fbackprop.diagnosing.record import LayerHealth as LayerHealth
from fbackprop.diagnosing.record import health as health
from fbackprop.diagnosing.record import rate_sweep as rate_sweep
from fbackprop.diagnosing.trials import Trial as Trial

__all__ = ["Finding", "Health", "LayerHealth", "Look", "Trial", "health", "rate_sweep"]
