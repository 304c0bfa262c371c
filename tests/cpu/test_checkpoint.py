"""Weights in: round trips through transformers' and the released FP8 formats, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graphs.checkpoint import load_checkpoint, resolve_model
from graphs.model_config import ModelConfig
from kernels.triton.weight_tiles import as_rows, in_tiles
from tests.cpu.checkpoints import (
    INDEX,
    YARN,
    Tensors,
    as_fp8,
    as_transformers_4,
    dequantised,
    edit_config,
    empty_views,
    is_fp8_linear,
    quantised,
    random_model,
    read_tensors,
    save_model,
    small_config,
    unpacked,
    write_tensors,
)
from tests.cpu.loaded import GATE, O_PROJ, assert_same, change_tensors, load, make, refused


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"rope_parameters": YARN, "rope_interleave": False},
        {"n_shared_experts": 0},
        {"n_shared_experts": 2},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
        {"tie_word_embeddings": True},
        {"n_group": 1, "topk_group": 1, "v_head_dim": 8},
        {"max_shard_size": "40KB"},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_transformers_checkpoint_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    make(tmp_path, **changes)
    cfg, views, report = load(tmp_path)
    assert_same(unpacked(cfg, views), read_tensors(tmp_path) | _tied(cfg, tmp_path))
    assert report.quantised == ()
    assert (tmp_path / INDEX).exists() == ("max_shard_size" in changes)


def _tied(cfg: ModelConfig, path: Path) -> Tensors:
    if not cfg.tie_word_embeddings:
        return {}
    return {"lm_head.weight": read_tensors(path)["model.embed_tokens.weight"]}


def test_packed_rows_are_where_the_step_reads_them(tmp_path: Path) -> None:
    """Against transformers' own modules, without the table that the loader follows."""
    model = random_model(small_config())
    save_model(tmp_path, model)
    _, views, _ = load(tmp_path)
    attention, experts = model.model.layers[1].self_attn, model.model.layers[1].mlp.experts
    qkv_a = torch.cat((attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight))
    assert torch.equal(views["layers.1.qkv_a"], qkv_a)
    w_uk, w_uv = attention.kv_b_proj.weight.view(4, 32, 16).split(16, dim=1)
    assert torch.equal(views["layers.1.w_uk"], w_uk)
    assert torch.equal(views["layers.1.w_uv"], w_uv)
    assert torch.equal(views["layers.1.experts_gate_up"], experts.gate_up_proj)
    assert torch.equal(views["layers.1.experts_down"], experts.down_proj)
    dense = model.model.layers[0].mlp
    gate_up = torch.cat((dense.gate_proj.weight, dense.up_proj.weight))
    assert torch.equal(views["layers.0.gate_up"], gate_up)
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(views["layers.1.router_bias"], bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoint_keeps_its_type(tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(tmp_path, random_model(small_config(), dtype=dtype))
    cfg, views, _ = load(tmp_path)
    assert cfg.act_dtype == str(dtype).removeprefix("torch.")
    assert views["layers.1.router"].dtype == torch.float32
    assert_same(unpacked(cfg, views), read_tensors(tmp_path))


def test_dtype_override_casts(tmp_path: Path) -> None:
    make(tmp_path)
    _, views, _ = load(tmp_path, overrides={"dtype": "bfloat16"})
    assert torch.equal(views["layers.0.o"], read_tensors(tmp_path)[O_PROJ].bfloat16())


def test_dtype_is_the_embedding_s_where_the_config_names_none(tmp_path: Path) -> None:
    make(tmp_path)
    edit_config(tmp_path, lambda config: config.pop("dtype"))
    assert resolve_model(str(tmp_path))[0].act_dtype == "float32"


def test_transformers_4_directory(tmp_path: Path) -> None:
    make(tmp_path, rope_parameters=YARN)
    five, _ = resolve_model(str(tmp_path))
    edit_config(tmp_path, as_transformers_4)
    change_tensors(tmp_path, _add_inv_freq)
    cfg, views, report = load(tmp_path)
    assert cfg == five
    assert_same(unpacked(cfg, views), read_tensors(tmp_path))
    assert list(report.left_out) == ["rotary frequencies, computed from config.json"]


def _add_inv_freq(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def test_fused_experts(tmp_path: Path) -> None:
    model = random_model(small_config())
    save_model(tmp_path, model)
    cfg, one_by_one, _ = load(tmp_path)
    write_tensors(tmp_path, {k: v for k, v in model.state_dict().items() if "inv_freq" not in k})
    assert "model.layers.1.mlp.experts.gate_up_proj" in read_tensors(tmp_path)
    for ep_rank in range(2):
        _, views, _ = load(tmp_path, ep_rank=ep_rank, ep_size=2)
        mine = slice(4 * ep_rank, 4 * ep_rank + 4)
        for name in ("layers.1.experts_gate_up", "layers.2.experts_down"):
            assert torch.equal(views[name], one_by_one[name][mine])


TILE_SIZES = {
    "vocab_size": 256,
    "hidden_size": 128,
    "v_head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_lie_in_tiles(
    dtype: torch.dtype, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(small_config(**TILE_SIZES), dtype=dtype)
    save_model(tmp_path, model)
    values = read_tensors(tmp_path)
    if fused:
        state = model.state_dict()
        write_tensors(tmp_path, {k: v for k, v in state.items() if "inv_freq" not in k})
    monkeypatch.setattr("graphs.checkpoint._PIECE_BYTES", 1)  # a piece is then 128 rows
    cfg, views, _ = load(tmp_path)
    leaves = {name.rsplit(".", 1)[-1] for name, view in views.items() if in_tiles(view)}
    assert leaves == {
        *("o", "gate_up", "down", "shared_gate_up", "shared_down"),
        *("experts_gate_up", "experts_down", "head"),
    }
    assert_same(unpacked(cfg, views), values)
    for ep_rank in range(2):
        _, mine, _ = load(tmp_path, ep_rank=ep_rank, ep_size=2)
        for name in ("layers.1.experts_gate_up", "layers.2.experts_down"):
            assert torch.equal(mine[name], views[name][4 * ep_rank : 4 * ep_rank + 4])


@pytest.mark.parametrize("name", [O_PROJ, GATE, "lm_head.weight"])
def test_a_value_in_tiles_that_float16_does_not_hold_is_refused(name: str, tmp_path: Path) -> None:
    make(tmp_path, **TILE_SIZES)
    change_tensors(tmp_path, lambda tensors: tensors[name][-1, -1].fill_(1e5))
    error = refused(tmp_path, overrides={"dtype": "float16"})
    assert f"{name}: expected values that fit float16" in str(error)
    assert "dtype=bfloat16" in str(error)


def test_each_rank_reads_its_experts_only(tmp_path: Path) -> None:
    make(tmp_path)
    _, whole, report = load(tmp_path)
    for ep_rank in range(4):
        _, views, part = load(tmp_path, ep_rank=ep_rank, ep_size=4)
        mine = whole["layers.2.experts_down"][2 * ep_rank : 2 * ep_rank + 2]
        assert torch.equal(views["layers.2.experts_down"], mine)
        assert torch.equal(views["layers.2.router"], whole["layers.2.router"])
        assert report.num_tensors - part.num_tensors == 2 * 6 * 3


ODD_SIZES = {
    "hidden_size": 192,
    "q_lora_rank": 136,
    "kv_lora_rank": 72,
    "intermediate_size": 200,
    "moe_intermediate_size": 136,
}


@pytest.mark.parametrize(
    "changes",
    [
        ODD_SIZES,
        ODD_SIZES | {"q_lora_rank": None, "n_shared_experts": 2},
        ODD_SIZES | {"n_shared_experts": 0, "first_k_dense_replace": 2},
        {"hidden_size": 256, "q_lora_rank": 128, "moe_intermediate_size": 128},
    ],
    ids=["odd", "odd,one query matrix", "odd,no shared", "whole blocks"],
)
def test_fp8_checkpoint_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    make(tmp_path, num_attention_heads=3, num_key_value_heads=3, **changes)
    values = as_fp8(tmp_path, shards=3)
    cfg, views, report = load(tmp_path)
    assert cfg.is_fp8
    assert report.quantised == ()
    assert_same(unpacked(cfg, views), values)
    stored = read_tensors(tmp_path)
    q = stored[GATE].view(torch.uint8)
    width = cfg.moe_intermediate_size
    gate = as_rows(views["layers.2.experts_gate_up"])[5, :width]
    assert torch.equal(gate.view(torch.uint8), q)
    scale = stored[f"{GATE}_scale_inv"]
    assert torch.equal(views["layers.2.experts_gate_up_scale"][5, : len(scale)], scale)


def test_fp8_padding_is_zero(tmp_path: Path) -> None:
    make(tmp_path, **ODD_SIZES)
    as_fp8(tmp_path)
    _, views, _ = load(tmp_path)
    assert not views["layers.0.qkv_a"][136:256].float().any()
    assert not views["layers.0.gate_up"][200:256].float().any()
    assert not views["layers.0.gate_up"][456:512].float().any()
    assert not views["layers.1.shared_gate_up"][136:256].float().any()


def test_fp8_fused_experts(tmp_path: Path) -> None:
    make(tmp_path, hidden_size=192, moe_intermediate_size=128)
    values = as_fp8(tmp_path)
    change_tensors(tmp_path, _fuse_experts)
    cfg, views, _ = load(tmp_path)
    assert_same(unpacked(cfg, views), values)


def _fuse_experts(tensors: Tensors) -> None:
    for layer in (1, 2):
        here = f"model.layers.{layer}.mlp.experts"
        for suffix, fused_suffix in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            parts = {
                proj: [tensors.pop(f"{here}.{e}.{proj}_proj.{suffix}") for e in range(8)]
                for proj in ("gate", "up", "down")
            }
            both = [torch.cat(p) for p in zip(parts["gate"], parts["up"], strict=True)]
            tensors[f"{here}.gate_up_proj{fused_suffix}"] = torch.stack(both)
            tensors[f"{here}.down_proj{fused_suffix}"] = torch.stack(parts["down"])


def test_fp8_fused_experts_that_split_a_block_are_refused(tmp_path: Path) -> None:
    make(tmp_path, moe_intermediate_size=136)
    as_fp8(tmp_path)
    change_tensors(tmp_path, _fuse_experts)
    assert "scale blocks do not divide moe_intermediate_size 136" in str(refused(tmp_path))


def test_partly_fp8_checkpoint_is_quantised_and_says_so(tmp_path: Path) -> None:
    make(tmp_path, **ODD_SIZES)
    plain = read_tensors(tmp_path)
    values = as_fp8(tmp_path, only=".experts.")
    cfg, views, report = load(tmp_path)
    assert O_PROJ in report.quantised
    assert GATE not in report.quantised
    state = unpacked(cfg, views)
    kv_b = "model.layers.0.self_attn.kv_b_proj.weight"
    assert kv_b not in report.quantised  # kept in the activations' type, absorbed
    assert torch.equal(state[kv_b], plain[kv_b])
    assert torch.equal(state[GATE], values[GATE])
    for name in report.quantised:
        assert torch.equal(state[name], dequantised(*quantised(plain[name]))), name


def test_plain_checkpoint_can_be_quantised_on_request(tmp_path: Path) -> None:
    make(tmp_path)
    _, _, report = load(tmp_path, overrides={"quantization": "fp8"})
    linears = [n for n in read_tensors(tmp_path) if is_fp8_linear(n) and "kv_b" not in n]
    assert sorted(report.quantised) == sorted(linears)


def test_large_tensor_in_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, vocab_size=1000, **ODD_SIZES)
    values = as_fp8(tmp_path, only=".experts.")
    _, whole, _ = load(tmp_path)
    monkeypatch.setattr("graphs.checkpoint._PIECE_BYTES", 1)  # a piece is then 128 rows
    cfg, views, _ = load(tmp_path)
    for name, view in views.items():
        assert torch.equal(view.float(), whole[name].float()), name
    assert torch.equal(unpacked(cfg, views)[GATE], values[GATE])


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    make(tmp_path)
    as_fp8(tmp_path)
    cfg, _ = resolve_model(str(tmp_path))
    seen: list[tuple[int, int]] = []
    report = load_checkpoint(
        tmp_path, cfg, empty_views(cfg), progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (report.bytes_read, report.bytes_read)
    assert report.bytes_read == sum(t.nbytes for t in read_tensors(tmp_path).values())
    assert seen == sorted(seen)


def _add_next_token_layer(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.startswith("model.layers.2.")]:
        tensors[name.replace("layers.2.", "layers.3.")] = tensors[name].clone()
    for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head"):
        tensors[f"model.layers.3.{name}.weight"] = torch.ones(4, 4)
    tensors["model.layers.3.embed_tokens.weight"] = torch.ones(4, 4)


def test_next_token_layer_is_left_out_by_name(tmp_path: Path) -> None:
    make(tmp_path)
    change_tensors(tmp_path, _add_next_token_layer)
    _, _, report = load(tmp_path)
    (reason, names), *others = report.left_out.items()
    assert not others
    assert reason == "next-token-prediction layer model.layers.3"
    assert "model.layers.3.eh_proj.weight" in names
    assert len(names) == 6 + sum(n.startswith("model.layers.2.") for n in read_tensors(tmp_path))


def test_a_further_decoder_layer_is_not_taken_for_one(tmp_path: Path) -> None:
    make(tmp_path)
    edit_config(tmp_path, lambda config: config.update(num_hidden_layers=2))
    error = refused(tmp_path)
    assert all("model.layers.2." in p and "expected no such tensor" in p for p in error.problems)


def test_layers_past_those_that_run_are_left_out(tmp_path: Path) -> None:
    make(tmp_path)
    change_tensors(tmp_path, _add_next_token_layer)
    cfg, views, report = load(tmp_path, layers=2)
    assert "layers past the first 2" in report.left_out
    assert "next-token-prediction layer model.layers.3" in report.left_out
    assert_same(unpacked(cfg, views), read_tensors(tmp_path))


def test_empty_shared_experts_are_left_out(tmp_path: Path) -> None:
    make(tmp_path, n_shared_experts=0)
    _, _, report = load(tmp_path)
    assert list(report.left_out) == ["shared experts of width 0"]


def test_stored_head_of_a_tied_model_must_be_the_embedding(tmp_path: Path) -> None:
    make(tmp_path, tie_word_embeddings=True)
    embed = read_tensors(tmp_path)["model.embed_tokens.weight"]
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": embed}))
    _, _, report = load(tmp_path)
    assert report.left_out == {"lm_head, the same as the embedding": ("lm_head.weight",)}
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": embed + 1}))
    error = refused(tmp_path)
    assert "lm_head.weight: expected model.embed_tokens.weight" in str(error)
    assert "--override tie_word_embeddings=false" in str(error)
    assert load(tmp_path, overrides={"tie_word_embeddings": False})[1]["head"].equal(embed + 1)
