"""What a person needs to trust a long run in FP8, cheap enough to leave on: see docs/monitor.md.

monitor = fp8moe.monitor.watch(model, every=100)
"""

from fp8moe.monitor.reading import LayerReading, NotFinite, OperandReading, Reading
from fp8moe.monitor.thresholds import Alert, MonitorWarning, Thresholds
from fp8moe.monitor.watch import Monitor, watch
from fp8moe.monitor.writers import JsonLines, TensorBoard

__all__ = [
    "Alert",
    "JsonLines",
    "LayerReading",
    "Monitor",
    "MonitorWarning",
    "NotFinite",
    "OperandReading",
    "Reading",
    "TensorBoard",
    "Thresholds",
    "watch",
]
