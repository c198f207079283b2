"""How good a model is: exact bits per byte, honest baselines, accuracy, and how sure the figures are."""

from dougong.evaluate.accuracy import Accuracy, accuracy
from dougong.evaluate.bits_per_byte import BitsPerByte, bits_per_byte, calibration, token_nats
from dougong.evaluate.calibration import Calibration
from dougong.evaluate.classical import classical_rivals, paired_accuracy
from dougong.evaluate.comparison import Comparison, evaluate_split
from dougong.evaluate.compressors import xz_concatenated, xz_per_document
from dougong.evaluate.frechet import frechet_distance
from dougong.evaluate.kneser_ney import KneserNey
from dougong.evaluate.scores import DocumentScores
from dougong.evaluate.statistics import (
    Spread,
    bootstrap_ratio,
    paired_difference,
    seed_spread,
    wilson_interval,
)

__all__ = ["Accuracy", "BitsPerByte", "Calibration", "Comparison", "DocumentScores", "KneserNey", "Spread", "accuracy",
           "bits_per_byte", "bootstrap_ratio", "calibration", "classical_rivals", "evaluate_split", "frechet_distance",
           "paired_accuracy", "paired_difference", "seed_spread", "token_nats", "wilson_interval",
           "xz_concatenated", "xz_per_document"]
