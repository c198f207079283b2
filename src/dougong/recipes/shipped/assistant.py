"""`assistant`: from Python's own library to a small model that answers questions about it and does small puzzles."""

from dougong.core.config import replace, to_dict
from dougong.data.python_questions import PythonQuestions, held_out_modules
from dougong.data.sources import PythonSource
from dougong.data.tasks import Tasks
from dougong.optim.build import MuonConfig
from dougong.optim.schedules import LinearConfig
from dougong.recipes.journey import CompressStage, Journey, TrainStage

SKILLS = ("reversed_addition", "sorting", "largest", "copying")


def assistant() -> Journey:
    """Reads the standard library but for the modules that it will be asked about, learns to answer, practises what can
    be checked, and is made small.

    Its skills: the `arguments` of functions (of modules that no stage has read), sums with their last digit first,
    sorting, the largest of some numbers, and copying (items that no stage has seen); it declines the rest.
    """
    puzzles = Tasks(skills=SKILLS, items=25_000, levels=(2, 3))
    return Journey(
        name="assistant",
        about="pretrain, learn to answer, practise by rewards, compress: a small assistant in about 12 minutes",
        stages={
            "pretrain": TrainStage(recipe="first", changes={
                "name": "pretrain", "size": "fit", "train": {"minutes": 3.5},
                "data": {"sources": [to_dict(PythonSource(exclude=held_out_modules()))]},
                "evaluate": {"baselines": False}, "sample": {"prompts": []}}),
            "sft": TrainStage(recipe="sft", changes={
                "data": {"sources": [to_dict(PythonQuestions(skills=("arguments",))), to_dict(puzzles),
                                     to_dict(Tasks(name="outside", skills=("declining",), items=4_000))]},
                "optim": to_dict(MuonConfig(lr=0.01, adamw_lr=0.004)), "schedule": to_dict(LinearConfig(warmup=0.02)),
                "train": {"minutes": 4.5}}),
            "practise": TrainStage(recipe="grpo", changes={
                "data": {"sources": [to_dict(replace(puzzles, items=2_000, seed=1))]},
                "objective": {"max_tokens": 48}, "optim": {"lr": 2e-4}, "train": {"minutes": 1.0}}),
            "compress": CompressStage(to="int8"),
        })
