"""Eight devices give what one gives, and say to each other only what the table announces."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from vmonarch_jax.models.wan.collectives import collectives, unannounced
from vmonarch_jax.models.wan.config import TransformerConfig
from vmonarch_jax.models.wan.keys_transformer import transformer_entries
from vmonarch_jax.models.wan.sharding import AXES, RULES, Rule, Sharding, make_mesh

import vmonarch_jax as vm

TESTS = Path(__file__).parent.parent


def run(*what):
    # The number of CPU devices is fixed when JAX starts, so this takes a process of its own.
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, TESTS / "wan_sharded.py", *what]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def abstract(**sizes):
    """A mesh whose devices nobody needs."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


def test_attention_on_eight_devices_is_that_of_one():
    found = run("attention")
    assert len(found) == 4
    assert {how: got for how, got in found.items() if not got["difference"] < 1e-5} == {}
    # q, k, v there and the output back, and their four gradients; none where keys are whole.
    assert [got["exchanges"] for got in found.values()] == [8, 8, 8, 0]


@pytest.mark.parametrize(
    "meshes", [("0",), pytest.param(("1", "2", "3"), marks=pytest.mark.slow)], ids=["one", "more"]
)
def test_model_on_eight_devices_is_that_of_one(meshes):
    found = run("model", *meshes)
    assert len(found) == len(meshes)
    for mesh, got in found.items():
        assert got["forward"] < 1e-5, mesh
        assert got["step"] < 1e-5, mesh
        assert got["kept"], f"{mesh}: parameters and updates lie where they lay"
        assert got["unannounced"] == [], mesh
        assert "all-gather" in got["kinds"], f"{mesh}: the count sees what there must be"


def test_what_is_remembered_lies_where_its_heads_are():
    found = run("memory")
    shares = {mesh: got["share"] for mesh, got in found.items()}
    # layers, batch, heads, tokens, head_dim
    assert list(shares.values()) == [[3, 2, 2, 45, 12]]
    for mesh, got in found.items():
        assert got["difference"] < 1e-5, mesh
        assert got["states"] < 1e-2, f"{mesh}: up to the rounding of bfloat16"
        assert got["kept"], f"{mesh}: states lie where they lay"
        assert got["unannounced"] == [], mesh


@pytest.mark.slow
def test_linear_branches_sum_over_all_tokens():
    found = run("linear")
    assert len(found) == 1
    for mesh, got in found.items():
        assert got["difference"] < 1e-5, mesh
        assert got["gates"] < 1e-5, mesh
        assert got["moved"], f"{mesh}: there are gradients to compare"
        assert got["unannounced"] == [], mesh


def test_every_full_size_parameter_divides():
    entries = transformer_entries(TransformerConfig(dim=5120, heads=40, layers=40, ffn_dim=13_824))
    sharding = Sharding(abstract(fsdp=2, context=8, tensor=4))
    found = sharding.param_shardings(entries)
    assert found["blocks.attn.q.kernel"].spec == P(None, ("fsdp", "context"), ("tensor",), None)
    assert found["blocks.mlp_out.kernel"].spec == P(None, ("tensor",), ("fsdp", "context"))
    whole = {e.name: e.full_shape for e in entries}
    share = sum(np.prod(found[name].shard_shape(shape)) for name, shape in whole.items())
    # Those without heads or hidden channels are split in fewer parts.
    assert share < 1.1 * sum(np.prod(shape) for shape in whole.values()) / 64


def test_rules_can_be_changed():
    rules = tuple(Rule("embed") if rule.logical == "embed" else rule for rule in RULES)
    sharding = Sharding(abstract(fsdp=2), rules)
    assert sharding.spec(("embed", "mlp"), "params") == P(None, ("tensor",))
    assert hash(sharding) == hash(Sharding(abstract(fsdp=2), rules))


@pytest.mark.parametrize(
    ("why", "call"),
    [
        ("product is 1 devices, got .*product is 2", lambda: make_mesh(data=2, devices=[0])),
        ("at least 1", lambda: make_mesh(data=0)),
        ("mesh with axes", lambda: Sharding(Mesh(np.array(jax.devices()[:1]), ("data",)))),
        ("one rule for each", lambda: Sharding(abstract(), (*RULES, Rule("mlp")))),
        ("of mesh axes", lambda: Rule("mlp", params=("model",))),
        ("got 'width'", lambda: Sharding(abstract()).spec(("batch", "width"))),
        ("'params' or 'activations'", lambda: Sharding(abstract()).axes("mlp", "cache")),
        ("2 names", lambda: Sharding(abstract()).constrain(jnp.ones((2, 3)), "batch")),
        (
            "batch that data . fsdp = 2 . 2 divides, got 2",
            lambda: Sharding(abstract(data=2, fsdp=2)).constrain(jnp.ones((2, 3)), "batch", None),
        ),
        ("heads .* = 2 . 4 divides, got 12", lambda: attend(12, context=4, tensor=2)),
        ("expected 8 tokens of grid", lambda: attend(8, tokens=9, context=4)),
        (
            "patch.kernel: expected embed that fsdp . context = 1 . 5 divides, got 96",
            lambda: Sharding(abstract(context=5)).param_shardings(
                transformer_entries(TransformerConfig(dim=96, heads=8, layers=1))
            ),
        ),
    ],
)  # fmt: skip
def test_wrong_input(why, call):
    with pytest.raises(ValueError, match=why):
        call()


def attend(heads, tokens=8, **sizes):
    x = jnp.ones((1, tokens, heads, 4))
    return Sharding(abstract(**sizes)).attend(vm.Dense(), x, x, x, vm.VideoGrid(2, 2, 2))


def operation(kind, groups, shape="f32[2,8]"):
    source = 'metadata={op_name="jit(f)/dot"}'
    return f"  %x.1 = {shape}{{1,0}} {kind}(%y), channel_id=1, {groups}, {source}"


@pytest.mark.parametrize(
    ("kind", "groups", "axes"),
    [
        ("all-gather", "replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}", ("context",)),
        ("all-reduce-start", "replica_groups=[4,2]<=[8]", ("tensor",)),
        ("all-reduce", "replica_groups=[2,4]<=[2,4]T(0,1), to_apply=%add", ("context", "tensor")),
        ("all-gather", "replica_groups=[4,2]<=[2,2,2]T(1,2,0)", ("data",)),
        ("all-to-all", "replica_groups=mesh['a'=2,'b'=1,'c'=2,'d'=2] {'c'}", ("context",)),
        (
            "all-gather",
            "replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}",
            ("context",),
        ),
        ("all-reduce", "replica_groups={}", ("data", "context", "tensor")),
        ("collective-permute", "source_target_pairs={{0,0},{1,3},{3,1}}", ("context",)),
    ],
)  # fmt: skip
def test_groups_are_read(kind, groups, axes):
    mesh = abstract(data=2, context=2, tensor=2)
    (found,) = collectives(operation(kind, groups), mesh)
    assert (found.kind, found.axes) == (kind.removesuffix("-start"), axes)
    assert (found.elements, found.source) == (16, "jit(f)/dot")


def test_what_is_not_announced_is_found():
    sharding = Sharding(abstract(data=2, context=2, tensor=2))
    along = {
        "data": "replica_groups=[4,2]<=[2,2,2]T(1,2,0)",
        "context": "replica_groups=[4,2]<=[2,2,2]T(0,2,1)",
        "tensor": "replica_groups=[4,2]<=[8]",
    }
    kinds = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute")
    fine = {
        False: {("all-gather", "context"), ("all-to-all", "context"), ("all-reduce", "tensor")},
    }
    fine[True] = fine[False] | {
        (kind, axis) for kind in ("all-reduce", "reduce-scatter") for axis in ("data", "context")
    }
    for training, expected in fine.items():
        silent = {
            (kind, axis)
            for kind in kinds
            for axis, groups in along.items()
            if not unannounced(operation(kind, groups), sharding, training)
        }
        assert silent == expected
    text = operation("all-reduce", along["context"])
    assert unannounced(text, sharding, unsplit=15)
    assert not unannounced(text, sharding, unsplit=16)
    norm = operation("all-reduce", "replica_groups={}", "f32[]")
    assert unannounced(norm, sharding)
    assert not unannounced(norm, sharding, training=True)


def test_rings_pass_parameters_and_nothing_else():
    sharding = Sharding(abstract(fsdp=2, context=4))

    def ring(pairs):
        listed = ",".join(f"{{{a},{b}}}" for a, b in pairs)
        return operation("collective-permute", f"source_target_pairs={{{listed}}}")

    # along both axes that split parameters; along one of them activations are split as well
    assert not unannounced(ring([(n, (n + 1) % 8) for n in range(8)]), sharding)
    assert unannounced(ring([(n, n // 4 * 4 + (n + 1) % 4) for n in range(8)]), sharding)
