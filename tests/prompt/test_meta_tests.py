"""Meta's own tests of its chat format and of its tool calls pass with Herd's code in the place of Meta's."""

import importlib.util
import sys
import unittest
from pathlib import Path

import llama_models
import pytest

from tests.prompt import meta_adapter

ROOT = Path(llama_models.__file__).parent


@pytest.mark.parametrize(
    ("file", "count"),
    [("llama4/tests/api/test_chat_format.py", 5), ("llama3/tests/api/test_tool_utils.py", 20)],
)
def test_meta_tests_pass(monkeypatch, file, count):
    for name, module in meta_adapter.modules().items():
        package, _, last = name.rpartition(".")
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)
    spec = importlib.util.spec_from_file_location("meta_tests", ROOT / file)
    assert spec is not None and spec.loader is not None
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromModule(tests).run(result)
    assert result.testsRun == count
    assert result.wasSuccessful(), [text for _, text in result.failures + result.errors]
    assert not result.skipped


def test_the_calls_of_those_tests_are_read():
    """In the file on the chat format, reading itself is mocked; these are the calls that it is mocked for."""
    read = meta_adapter.ToolUtils.maybe_extract_custom_tool_call
    weather = read('[get_weather(location="San Francisco", units="metric")]')
    assert weather == ("get_weather", {"location": "San Francisco", "units": "metric"})
    mixed = read('[complex_function(title="My Title", numbers=[1, 2, 3], enabled=true, score=3.14)]')
    assert mixed == ("complex_function", {"title": "My Title", "numbers": [1, 2, 3], "enabled": True, "score": 3.14})
    assert read("Just a regular response with no tool calls.") is None
