"""What the backend knows of memory and, for GPUs, of tables on the device."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm_kit import BlockTables, Stub, common

from anabranch.integrations.vllm.pages import pages_of


def test_pages_are_views_laid_out_as_vllms_own():
    cache = torch.arange(3 * 2 * 4 * 10.0).view(3, 2, 4, 10)
    k, v = pages_of(cache, 5)
    own_k, own_v = (x.transpose(1, 2) for x in cache.view(3, 2, 8, 5).chunk(2, dim=2))  # CPUAttentionBackendImpl
    assert torch.equal(k, own_k) and torch.equal(v, own_v)
    assert k.shape == (3, 4, 2, 5) and k.data_ptr() == cache.data_ptr()
    part_k, part_v = pages_of(torch.stack([cache, cache + 1000])[1], 5)
    assert torch.equal(part_k, k + 1000) and torch.equal(part_v, v + 1000)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)])
def test_pages_elsewhere_have_k_and_v_side_by_side(order):
    """Any order of blocks, heads and tokens in memory; on the meta device only shapes can be looked at."""
    shape = (3, 2, 4, 10)
    back = [order.index(i) for i in range(4)]
    cache = torch.empty([shape[i] for i in order], device="meta").permute(back)
    k, v = pages_of(cache, 5)
    own_k, own_v = cache.transpose(1, 2).split(5, dim=-1)  # TritonAttentionImpl
    for ours, own in ((k, own_k), (v, own_v)):
        assert (ours.shape, ours.stride(), ours.storage_offset()) == (own.shape, own.stride(), own.storage_offset())


def test_other_memory_is_refused():
    for cache in (torch.zeros(3, 2, 4, 12), torch.zeros(3, 2, 40)):
        with pytest.raises(ValueError, match="kv_cache: expected"):
            pages_of(cache, 5)
    for cache in (torch.zeros(3, 4, 2, 10).transpose(1, 2), torch.zeros(3, 2, 10, 4).transpose(2, 3)):
        with pytest.raises(ValueError, match="kv_cache: strides"):
            pages_of(cache, 5)


# ------------------------------------------------------------------------------------------------------------- mirror


@pytest.fixture
def mirror(monkeypatch):
    stub = Stub().install(monkeypatch)
    from anabranch.integrations.vllm.mirror import Mirror

    tables = stub.modules["vllm.v1.worker.gpu.block_table"]["BlockTables"]
    return Mirror.install(), tables


def ask(mirror, tables, group, order, lengths, block_size=4, slots=None):
    on_device = tables.gather(order)[group]
    meta = common(on_device, lengths, [1] * len(order), slots)
    meta.block_table_tensor, meta.req_idx = on_device, np.array(order)
    blocks = -(-np.array(lengths) // block_size)
    found = mirror.tables(meta, blocks)
    return [row[:n].tolist() for row, n in zip(found, blocks, strict=True)]


def counting(monkeypatch):
    from anabranch.integrations.vllm import batch

    copies, real = [], batch.tables_on_host
    monkeypatch.setattr(batch, "tables_on_host", lambda *a: copies.append(1) or real(*a))
    return copies


def test_the_mirror_is_relied_on_once_it_was_right(mirror, monkeypatch):
    """Rows added, grown, given to another request; two groups of layers; requests in any order."""
    from anabranch.integrations.vllm import mirror as module

    monkeypatch.setattr(module, "CHECKS", 3)
    found, kind = mirror
    found._left = 3
    tables, copies = kind(6, [8, 4]), counting(monkeypatch)
    tables.append_block_ids(2, ([5, 6], [1]), overwrite=True)
    tables.append_block_ids(4, ([5, 7], [2]), overwrite=True)
    assert ask(found, tables, 0, [4, 2], [8, 5]) == [[5, 7], [5, 6]]
    tables.append_block_ids(2, ([9], []), overwrite=False)
    assert ask(found, tables, 0, [2, 4], [9, 8]) == [[5, 6, 9], [5, 7]]
    assert ask(found, tables, 1, [2], [4]) == [[1]] and len(copies) == 3
    tables.append_block_ids(2, ([3], [3]), overwrite=True)
    assert ask(found, tables, 0, [2, 4], [4, 8]) == [[3], [5, 7]] and len(copies) == 3
    assert ask(found, kind(6, [8]), 0, [1], [0]) == [[]] and len(copies) == 4  # tables that it was not told of


def test_a_mirror_that_was_wrong_is_given_up(mirror, monkeypatch, caplog):
    found, kind = mirror
    tables = kind(4, [8])
    tables.append_block_ids(0, ([5, 6],), overwrite=True)
    tables.kept[0][0, 1] = 7  # written past it
    with caplog.at_level(logging.WARNING, "vllm.anabranch"):
        assert ask(found, tables, 0, [0], [8], slots=torch.tensor([-1])) == [[5, 7]]  # a warm-up says nothing
        assert not caplog.records
        assert ask(found, tables, 0, [0], [8]) == [[5, 7]]
    assert "differs from the GPU's own" in caplog.text
    found._left = 0
    assert ask(found, tables, 0, [0], [8]) == [[5, 7]]


def test_tables_forgotten_with_their_runner(mirror):
    found, kind = mirror
    tables = kind(4, [8])
    tables.append_block_ids(0, ([5],), overwrite=True)
    assert len(found._rows) == 1
    del tables
    assert len(found._rows) == 0


def test_a_gpu_is_said_to_be_unproven_once(monkeypatch, caplog):
    Stub().install(monkeypatch)
    from vllm_kit import vllm_config

    from anabranch.integrations.vllm.builder import TreeMetadataBuilder
    from anabranch.integrations.vllm.mirror import Mirror

    spec = SimpleNamespace(block_size=4, head_size=32)
    with caplog.at_level(logging.WARNING, "vllm.anabranch"):
        builders = [TreeMetadataBuilder(spec, [], vllm_config(), torch.device("cuda")) for _ in range(2)]
    assert caplog.text.count("On a GPU it is untried") == 1
    assert all(builder.tables == Mirror.install().tables for builder in builders)


def test_lengths_of_a_gpus_step_are_the_hosts():
    from anabranch.integrations.vllm import batch

    meta = common(torch.zeros(2, 1), [3, 4], [1, 1])
    assert batch.lengths_of(meta).tolist() == [3, 4]
    meta.seq_lens, meta.seq_lens_cpu_upper_bound = meta.seq_lens.to("meta"), torch.tensor([5, 6, 0])
    assert batch.lengths_of(meta).tolist() == [5, 6]


def test_the_stand_in_is_like_vllms_tables():
    assert list(BlockTables.append_block_ids.__annotations__) == ["req_index", "new_block_ids", "overwrite", "return"]
