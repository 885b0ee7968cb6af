"""Models of several tasks with scikit-learn's interface, without a network: ``fit(X, y, task)``, ``predict(X, task)``.

>>> import numpy as np
>>> random = np.random.default_rng(0)
>>> task = np.repeat(np.arange(20), 8)  # 20 tasks with 8 rows each
>>> weights = np.array([1.0, -2.0, 0.5]) + 0.1 * random.normal(size=(20, 3))
>>> X = random.normal(size=(160, 3))
>>> y = (X * weights[task]).sum(1) + 0.1 * random.normal(size=160)
>>> model = MeanRegularizedRidge(alpha="cv").fit(X, y, task)
>>> bool(abs(model.coef_ - weights).mean() < abs(IndependentRidge(alpha="cv").fit(X, y, task).coef_ - weights).mean())
True
"""

from mtl.linear.gaussian_process import HierarchicalGP
from mtl.linear.mixed_effects import MixedEffectsRegressor
from mtl.linear.ridge import IndependentRidge, MeanRegularizedRidge, PooledRidge
from mtl.linear.stacked import StackedRegressor
from mtl.linear.trace_norm import TraceNormRegressor

__all__ = [
    "HierarchicalGP",
    "IndependentRidge",
    "MeanRegularizedRidge",
    "MixedEffectsRegressor",
    "PooledRidge",
    "StackedRegressor",
    "TraceNormRegressor",
]
