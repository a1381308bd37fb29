from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from transformers import PreTrainedTokenizerBase

from tasks.adapters.package import package
from tasks.core.artifacts import atomic_folder
from tasks.core.records import Message
from tasks.inference.chat import answer
from tasks.inference.params import GREEDY
from tasks.inference.turns import in_step, passes_side_by_side
from tasks.models.loader import load_model
from tests.tasks.adapters.test_files import published

DRAWN = {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.2, "repetition_range": 4, "seed": 3}


def asking(text: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 6, **options}


def version_of(folder: Path, **artifacts: Path) -> Any:
    """A version as MLflow loads it, signature and all."""
    import mlflow

    from tasks.serving.signature import chat_signature
    from tests.conftest import ROOT

    mlflow.pyfunc.save_model(
        folder / "version",
        python_model=str(ROOT / "tasks" / "serving" / "chat_model.py"),
        artifacts={name: str(path) for name, path in artifacts.items()},
        signature=chat_signature(),
        input_example=asking("Hello"),
        pip_requirements=[],
    )
    return mlflow.pyfunc.load_model(str(folder / "version"))


@pytest.fixture(scope="module")
def served(pico_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pico model as a version."""
    folder = tmp_path_factory.mktemp("served")
    with atomic_folder(folder / "model") as model:
        shutil.copytree(pico_base, model, dirs_exist_ok=True)
    return version_of(folder, model=folder / "model")


@pytest.fixture(scope="module", params=["loreft", "parallel", "prompt_tuning"])
def served_with_adapter(
    pico_base: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Any:
    """The pico model and what stays beside its weights, as a version."""
    folder = tmp_path_factory.mktemp("adapted")
    with atomic_folder(folder / "base") as base:
        shutil.copytree(pico_base, base, dirs_exist_ok=True)
    adapter = published(folder / "base", request.param, folder / "trained")
    with atomic_folder(folder / "model") as draft:
        package(folder / "base", adapter, draft, folder / "model")
    return version_of(folder, model=folder / "model", base=folder / "base")


def said(served: Any, request: dict[str, Any] | pd.DataFrame) -> list[str]:
    return [reply["choices"][0]["message"]["content"] for reply in served.predict(request)]


def test_a_request_is_answered_greedily_or_as_it_asks(
    served: Any, pico_base: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, turns = load_model(pico_base), [Message("user", "Hello")]
    (greedy,) = said(served, asking("Hello"))
    assert greedy == answer(model, tokenizer, turns, 6).text
    drawn = answer(model, tokenizer, turns, 6, GREEDY.model_copy(update=DRAWN)).text
    assert said(served, asking("Hello", **DRAWN)) == [drawn]
    assert drawn != greedy
    assert said(served, asking("Hello", **{**DRAWN, "seed": 4})) != [drawn]


def test_whole_numbers_nulls_and_blanks_of_a_data_frame_are_understood(served: Any) -> None:
    """MLflow's own types would refuse all three."""
    (greedy,), (drawn,) = said(served, asking("Hello")), said(served, asking("Hello", temperature=2.0, seed=3))
    assert said(served, asking("Hello", temperature=2, seed=3)) == [drawn]
    assert said(served, asking("Hello", temperature=None, top_k=None)) == [greedy]
    frame = pd.DataFrame([asking("Hello", temperature=2, seed=3), asking("Hello")])
    assert frame["seed"].dtype == float
    assert said(served, frame) == [drawn, greedy]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": -1.0}, "the request: text cannot be generated like this"),
        ({"temperature": -1.0}, "temperature: Input should be greater than or equal to 0; got -1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p: Input should be less than or equal to 1; got 1.5"),
        ({"temperature": 1.0, "top_k": -2}, "top_k: Input should be greater than or equal to 0; got -2"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k: Input should be a valid integer"),
        ({"temperature": [1.0, 2.0]}, "temperature: Input should be a valid number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: Input should be greater than 0"),
        ({"repetition_range": -1}, "repetition_range: Input should be greater than or equal to 0"),
        ({"top_p": 0.5}, "top_k and top_p need a temperature above 0"),
        ({"max_tokens": 0}, "max_tokens: is no length"),
        ({"max_tokens": "six"}, "max_tokens: is no length"),
    ],
)
def test_an_option_out_of_range_is_refused(served: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(MlflowException) as caught:
        served.predict(asking("Hello") | options)
    assert told in str(caught.value)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"  # status 400 of a server


def test_a_conversation_without_turns_is_refused(served: Any) -> None:
    """What else is no conversation MLflow refuses by the signature."""
    with pytest.raises(MlflowException, match="is no conversation") as caught:
        served.predict({"messages": []})
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    for messages in ("Hello", [{"role": "user"}], [{"role": "user", "content": 1}]):
        with pytest.raises(MlflowException, match="Failed to enforce schema"):
            served.predict({"messages": messages})


def test_a_server_answers_invocations(served: Any) -> None:
    """What `mlflow models serve` runs, without its process."""
    from fastapi.testclient import TestClient
    from mlflow.pyfunc.scoring_server import init

    client = TestClient(init(served))
    reply = client.post("/invocations", json=asking("Hello"))
    assert reply.status_code == 200
    assert [each["choices"][0]["message"]["content"] for each in reply.json()] == said(served, asking("Hello"))
    refused = client.post("/invocations", json={"messages": []})
    assert refused.status_code == 400
    assert "is no conversation" in refused.json()["message"]


# --- several at once --------------------------------------------------------------------------------------------------

QUESTIONS = ["Hello", "What is 1 plus 2?", "Count the animals: cat, dog, cow, cat", "Which word is last: a b c"]
REQUESTS = [asking(question, **(DRAWN | {"seed": n}) if n % 2 else {}) for n in range(4) for question in QUESTIONS]


@contextmanager
def scoring_server(served: Any) -> Iterator[str]:
    """MLflow's scoring server of a version, which answers in threads, as `mlflow models serve` runs it; its address."""
    import uvicorn
    from mlflow.pyfunc.scoring_server import init

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(init(served), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/invocations"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def test_sixteen_requests_at_once_get_the_answers_that_each_gets_alone(served_with_adapter: Any) -> None:
    def post(request: dict[str, Any]) -> Any:
        with urlopen(Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})) as reply:
            return json.load(reply)

    with scoring_server(served_with_adapter) as address, ThreadPoolExecutor(16) as clients:
        alone = [post(request) for request in REQUESTS]
        assert list(clients.map(post, REQUESTS)) == alone
    assert len({json.dumps(reply) for reply in alone}) > 4  # or it would show nothing


def test_two_requests_in_step_get_the_answers_that_each_gets_alone(served_with_adapter: Any) -> None:
    model = served_with_adapter.unwrap_python_model().model
    assert passes_side_by_side(model)
    for one, other in ((0, 2), (1, 5), (4, 6)):
        asked = [REQUESTS[one] | {"max_tokens": 2}, REQUESTS[other]]
        alone = [said(served_with_adapter, request) for request in asked]
        assert in_step(model, [lambda r=r: said(served_with_adapter, r) for r in asked]) == alone  # type: ignore[misc]
