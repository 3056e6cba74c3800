"""The attention backend inside a real vLLM, token for token beside vLLM's own: `make test-servers` installs one."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from benchmarks.vllm_env import environment

from anabranch import models
from anabranch.integrations.vllm.versions import TESTED

pytestmark = pytest.mark.server
RUN = Path(__file__).with_name("vllm_run.py")
USED = "by anabranch, blocks of"


def ids(count: int, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(100, 40_000) for _ in range(count)]


PREFIX = ids(300, 0)
GREEDY = dict(temperature=0, max_tokens=24, ignore_eos=True)
#: cold siblings in one step; then a tree whose branches leave at several depths, found in the cache where there is one
COLD = dict(prompts=[PREFIX + ids(n, n) for n in (5, 40, 77, 3)], params=GREEDY)
WARM = dict(prompts=[PREFIX[:n] + ids(9, n) for n in (300, 290, 170, 64)] + [ids(50, 9)], params=GREEDY)
SAMPLES = dict(
    prompts=[[*PREFIX[:200], 7, 8, 9]], params=dict(temperature=1.0, n=16, seed=3, max_tokens=24, ignore_eos=True)
)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """(program, its arguments, variables) → what it printed, by the Python of vLLM's environment."""
    python = os.environ.get("ANABRANCH_TEST_VLLM")
    if not python:
        pytest.skip("no vLLM: run make test-servers, or set ANABRANCH_TEST_VLLM to the Python of its environment")
    folder = tmp_path_factory.mktemp("site")

    def run(*arguments, **variables):
        command = [python, *arguments]
        done = subprocess.run(command, env=environment(folder, **variables), capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def answers(vllm):
    @functools.cache
    def ask(job, variables=()):
        status, out, err = vllm(str(RUN), job, **dict(variables))
        assert status == 0, out[-3000:] + err[-3000:]
        assert (USED in out + err) == ('"CUSTOM"' in job)
        return json.loads(next(line for line in out.splitlines() if line.startswith("ANSWER ")).removeprefix("ANSWER "))

    def of(model, waves, ours=True, variables=(), **engine):
        engine = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 32, **engine}
        if ours:
            engine["attention_backend"] = "CUSTOM"
        return ask(json.dumps({"model": str(model), "engine": engine, "waves": waves}), variables)

    return of


@pytest.mark.parametrize(
    "engine",
    [
        dict(block_size=16),
        dict(block_size=32, enable_prefix_caching=False),
        dict(block_size=128),
    ],
    ids=str,
)
def test_the_same_tokens_as_its_own_backend(answers, engine):
    waves = [COLD, WARM, SAMPLES]
    model = models.path("smollm2")
    own, ours = answers(model, waves, ours=False, block_size=32), answers(model, waves, **engine)
    assert ours["answers"] == own["answers"]
    assert len({tuple(sample) for sample in ours["answers"][2][0]}) == 16
    cached = engine.get("enable_prefix_caching", True)
    assert all((found > 0) == cached for found in ours["cached"])


@pytest.mark.parametrize("engine", [dict(block_size=16), dict(block_size=32, enable_prefix_caching=False)], ids=str)
def test_prompts_in_chunks(answers, engine):
    """Chunks of 100 tokens end within blocks. Greedy: vLLM's CPU build cannot seed requests whose prompts it cuts."""
    model = models.path("smollm2")
    own = answers(model, [COLD, WARM, SAMPLES], ours=False, block_size=32)["answers"]
    ours = answers(model, [COLD, WARM], max_num_batched_tokens=100, enable_chunked_prefill=True, **engine)
    assert ours["answers"] == own[:2]


def test_tensor_parallel_on_two_ranks(answers):
    """Each rank has some of the heads; ranks on cores of their own."""
    cores = sorted(os.sched_getaffinity(0))
    bound = (("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}"),)
    own = answers(tiny(**LLAMA), [COLD, SAMPLES], ours=False, block_size=32)
    ours = answers(tiny(**LLAMA), [COLD, SAMPLES], variables=bound, tensor_parallel_size=2)
    assert ours["answers"] == own["answers"]


def test_a_compiled_model(answers):
    """As vLLM runs models by default; attention stays an operator of its own."""
    own = answers(tiny(**LLAMA), [COLD, SAMPLES], ours=False, block_size=32)
    assert answers(tiny(**LLAMA), [COLD, SAMPLES], enforce_eager=False)["answers"] == own["answers"]


def test_windows_and_softcap(answers):
    """Gemma 2: a window in every other layer, whose blocks vLLM gives up behind it, and capped scores."""
    config = tiny(
        "gemma2", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=48,
        attn_logit_softcapping=2.0, query_pre_attn_scalar=32, hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    own = answers(config, [COLD, WARM, SAMPLES], ours=False, block_size=32)
    for size in (16, 32):
        assert answers(config, [COLD, WARM, SAMPLES], block_size=size)["answers"] == own["answers"]


LLAMA = dict(kind="llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=2)


@functools.cache
def tiny(kind: str, **changes) -> Path:
    """A small random model in a folder."""
    import tempfile

    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = dict(num_hidden_layers=4, intermediate_size=128, vocab_size=49_152, max_position_embeddings=2048)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**options, **changes}))
    for name, weight in model.named_parameters():  # as made they hardly tell tokens apart
        if weight.dim() > 1 and "embed" not in name:
            weight.data.mul_(5)
    folder = Path(tempfile.mkdtemp(prefix="anabranch-test-"))
    model.save_pretrained(folder)
    return folder


def test_what_it_rests_on_is_there(vllm):
    """The version, names and arguments that the backend was written for."""
    code = f"""
        import inspect, vllm
        assert vllm.__version__.split("+")[0] == {TESTED[-1]!r}, vllm.__version__
        from vllm.plugins import load_general_plugins
        load_general_plugins()
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        ours = AttentionBackendEnum.CUSTOM.get_class()
        assert AttentionBackendEnum.CPU_ATTN.get_class().get_name() == "CPU_ATTN"
        from vllm.v1.attention.backend import CommonAttentionMetadata
        fields = CommonAttentionMetadata.__dataclass_fields__
        assert {{"query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "num_reqs", "block_table_tensor",
                 "slot_mapping", "causal", "req_idx"}} <= fields.keys()
        assert not ours.get_builder_cls().__abstractmethods__ and not ours.get_impl_cls().__abstractmethods__
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
        from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
        known = inspect.signature(ours.get_impl_cls().__init__).parameters
        theirs = inspect.signature(CPUAttentionBackendImpl.__init__).parameters
        assert [n for n in known if n != "more"] == list(theirs)
        from vllm.v1.worker.gpu.block_table import BlockTables
        names = list(inspect.signature(BlockTables.append_block_ids).parameters)
        assert names == ["self", "req_index", "new_block_ids", "overwrite"], names
        source = inspect.getsource(BlockTables)
        for name in ("self.num_blocks", "self.input_block_tables", "redirect_writes_to_null_block"):
            assert name in source, name
        print("all there")
    """
    status, out, err = vllm("-c", textwrap.dedent(code))
    assert status == 0 and "all there" in out, out + err


GUESSES = dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=3)


@pytest.mark.parametrize(
    "engine,match",
    [(dict(kv_cache_dtype="fp8"), "K and V kept as fp8"), (dict(speculative_config=GUESSES), "speculative decoding")],
    ids=["fp8", "guesses"],
)
def test_what_is_refused_when_the_model_is_loaded(vllm, engine, match):
    engine = {"attention_backend": "CUSTOM", "max_model_len": 512, **engine}
    job = {"model": str(models.path("smollm2")), "engine": engine, "waves": []}
    status, out, err = vllm(str(RUN), json.dumps(job))
    assert status != 0 and f"--attention-backend CUSTOM (anabranch): {match}" in out + err
