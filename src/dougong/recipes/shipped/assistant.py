"""`assistant`: from Python's own library to a small model that answers questions about it and does small puzzles."""

from dougong.core.config import to_dict
from dougong.data.python_questions import PythonQuestions, held_out_modules
from dougong.data.sources import PythonSource
from dougong.data.tasks import Tasks
from dougong.optim.build import MuonConfig
from dougong.optim.schedules import LinearConfig
from dougong.recipes.journey import CompressStage, Journey, TrainStage

SKILLS = ("addition", "sorting", "brackets", "counting")


def assistant() -> Journey:
    """Reads the standard library but for the modules that it will be asked about, learns to answer, practises what can
    be checked, and is made small.

    Its skills: `which` of a module's functions does what (modules that no stage has read), sums, sorting, brackets and
    counting (items that no stage has seen); it declines the rest.
    """
    practised = Tasks(skills=SKILLS, items=2_000, levels=(1, 2), seed=1)
    return Journey(
        name="assistant",
        about="pretrain, learn to answer, practise by rewards, compress: a small assistant in about 12 minutes",
        stages={
            "pretrain": TrainStage(recipe="first", changes={
                "name": "pretrain", "size": "fit", "train": {"minutes": 4.0},
                "data": {"sources": [to_dict(PythonSource(exclude=held_out_modules()))]},
                "evaluate": {"baselines": False}}),
            "sft": TrainStage(recipe="sft", changes={
                "data": {"sources": [to_dict(PythonQuestions(skills=("which",))),
                                     to_dict(Tasks(skills=(*SKILLS, "declining"), items=20_000, levels=(1, 2)))]},
                "optim": to_dict(MuonConfig(lr=0.01, adamw_lr=0.004)), "schedule": to_dict(LinearConfig(warmup=0.02)),
                "train": {"minutes": 4.0}}),
            "practise": TrainStage(recipe="grpo", changes={
                "data": {"sources": [to_dict(practised)]}, "objective": {"max_tokens": 16}, "train": {"minutes": 1.0}}),
            "compress": CompressStage(to="int8"),
        })
