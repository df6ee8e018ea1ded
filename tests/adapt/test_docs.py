"""What docs/adapters.md shows is what happens."""

import re
from pathlib import Path

import pytest
from peft import PeftModel

from echelon.models import load

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_runs_and_leaves_adapters_that_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)), {})
    for folder in ("nested", "rank_4", "coefficients", "scalings", "plain", "whole", "forgets"):
        PeftModel.from_pretrained(load("embedded").model, folder)
