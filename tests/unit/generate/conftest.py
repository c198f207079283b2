import pytest
from tiny_models import CONFIGS, build


@pytest.fixture(params=list(CONFIGS))
def model(request):
    return build(request.param)


@pytest.fixture
def qwen3():
    return build("qwen3")
