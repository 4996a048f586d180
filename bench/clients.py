"""Clients that nobody wrote for Herd and that are too large for the tests: lm-eval and Open WebUI against `herd serve`.

    python -m bench.clients [--only lm-eval|open-webui] [--limit 40] [--out bench/results/clients.json]

Each client gets an environment of its own in build/clients, by pip and name, once (Open WebUI: 7 GB). Nothing is
fetched while they run.

- lm-eval (`local-chat-completions`) asks the questions that its package brings: those of MMLU's few-shot examples, 285
  with their answers. The score says that requests and answers fit each other; a model of Cria's size guesses at them.
- Open WebUI is started without a page; an account is made through its API, and through it models are listed and chats
  answered, at once and streamed, with Herd as its OpenAI connection. Its own embedding model stays off.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.server import serving

NAMES = {"lm-eval": ("lm-eval[api]==0.4.13", "lm_eval"), "open-webui": ("open-webui==0.12.4", "open-webui")}
BUILD, START_S = Path("build/clients"), 300
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
TASK = """\
task: shipped_mmlu
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}\\nAnswer with the letter of the right choice, such as (A)."
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n\\n"]
  do_sample: false
  max_gen_toks: 32
filter_list:
  - name: letter
    filter:
      - function: regex
        regex_pattern: "\\\\(?([A-D])\\\\b"
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def installed(name: str) -> Path:
    """The command of a client; its environment is made if it is not there."""
    package, command = NAMES[name]
    folder = (BUILD / name).absolute()
    if not (folder / "bin" / command).exists():
        print(f"installing {package} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", package], check=True)
    return folder / "bin" / command


def questions(command: Path) -> list[dict[str, str]]:
    """Questions with choices, and the letter of the right one, out of the package."""
    [found] = command.parents[1].glob("lib/*/site-packages/lm_eval/tasks/mmlu/flan_cot_fewshot/_cot_prompts.json")
    asked = []
    for text in json.loads(found.read_text()).values():
        for part in text.split("\n\nQ: ")[1:]:
            question, _, reasons = part.partition("\nA: ")
            answer = re.search(r"[Tt]he answer is \(([A-D])\)", reasons)
            if answer and "(A)" in question:
                asked.append({"question": question.strip(), "answer": answer[1]})
    return asked


def lm_eval(url: str, limit: int) -> dict[str, Any]:
    """Its own command, against the chat route."""
    command = installed("lm-eval")
    with tempfile.TemporaryDirectory() as folder:
        asked = questions(command)
        (Path(folder) / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
        (Path(folder) / "task.yaml").write_text(TASK.format(file=f"{folder}/questions.jsonl"))
        settings = f"model=cria,base_url={url}/v1/chat/completions,num_concurrent=8,max_retries=1,eos_string=<|im_end|>"
        arguments = ["--model", "local-chat-completions", "--model_args", settings, "--tasks", "shipped_mmlu"]
        arguments += ["--include_path", folder, "--apply_chat_template", "--output_path", folder, "--limit", str(limit)]
        environment = {**os.environ, **OFFLINE, "HF_HOME": folder, "OPENAI_API_KEY": "any"}
        began = time.perf_counter()
        done = subprocess.run([command, *arguments], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"lm-eval failed:\n{done.stderr[-3000:]}")
        [result] = Path(folder).rglob("results_*.json")
        found = json.loads(result.read_text())
    return {
        "version": found["lm_eval_version"],
        "questions": found["n-samples"]["shipped_mmlu"],
        "results": found["results"]["shipped_mmlu"],
        "seconds": round(time.perf_counter() - began, 1),
    }


def open_webui(url: str) -> dict[str, Any]:
    """Start it, and talk to Herd through its API."""
    command, port = installed("open-webui"), 8765
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            **OFFLINE,
            "DATA_DIR": folder,
            "HF_HOME": folder,
            "OPENAI_API_BASE_URL": f"{url}/v1",
            "OPENAI_API_KEY": "any",
            "ENABLE_OLLAMA_API": "False",
            "RAG_EMBEDDING_ENGINE": "openai",  # or it loads a model of its own
            "OFFLINE_MODE": "True",
            "WEBUI_SECRET_KEY": "bench",
        }
        with (Path(folder) / "log").open("w") as log:
            arguments = ["serve", "--host", "127.0.0.1", "--port", str(port)]
            popen = subprocess.Popen([command, *arguments], env=environment, cwd=folder, stdout=log, stderr=log)
        try:
            began = time.perf_counter()
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
                _wait(http, popen, Path(folder) / "log")
                ready = time.perf_counter() - began
                version = http.get("/api/version").json()["version"]
                return {"version": version, "started_s": round(ready, 1), **_talk(http)}
        finally:
            popen.terminate()
            try:
                popen.wait(30)
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()


def _wait(http: httpx.Client, popen: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(START_S):
        if popen.poll() is not None:
            break
        try:
            if http.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    sys.exit(f"Open WebUI does not start:\n{log.read_text()[-3000:]}")


def _talk(http: httpx.Client) -> dict[str, Any]:
    account = {"name": "bench", "email": "bench@example.com", "password": "a-long-passphrase-1"}
    token = http.post("/api/v1/auths/signup", json=account).raise_for_status().json()["token"]
    http.headers["Authorization"] = f"Bearer {token}"
    models = [model["id"] for model in http.get("/api/models").raise_for_status().json()["data"]]
    body: dict[str, Any] = {
        "model": "cria",
        "messages": [{"role": "user", "content": "Say hello."}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = http.post("/api/chat/completions", json={**body, "stream": False}).raise_for_status().json()
    said, pieces, ended = "", 0, False
    with http.stream("POST", "/api/chat/completions", json={**body, "stream": True}) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                for choice in json.loads(line[6:]).get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    said, pieces = said + piece, pieces + bool(piece)
    text = whole["choices"][0]["message"]["content"]
    if "cria" not in models or not ended or said != text:
        sys.exit(
            f"Open WebUI says {models}, {text!r} at once, and {said!r} as a stream ({'ended' if ended else 'cut'})"
        )
    return {"models": models, "answer": text, "pieces_of_stream": pieces, "stream_says_the_same": said == text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--limit", type=int, default=40, help="questions that lm-eval asks")
    parser.add_argument("--out", type=Path, default=Path("bench/results/clients.json"))
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    with serving() as process:
        for name in [options.only] if options.only else list(NAMES):
            found[name] = lm_eval(process.url, options.limit) if name == "lm-eval" else open_webui(process.url)
            print(name, json.dumps(found[name]), flush=True)
    found["command"] = " ".join(["python -m bench.clients", *sys.argv[1:]])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
