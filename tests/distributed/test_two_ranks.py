import pytest
from launch import check_names, launch

FILE = "two_ranks.py"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return launch(FILE, 2, tmp_path_factory.mktemp("two_ranks"))


@pytest.mark.parametrize("name", check_names(FILE))
def test_two_ranks(verdicts: dict[str, str], name: str) -> None:
    assert verdicts[name] == "ok", verdicts[name]
