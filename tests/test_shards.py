"""DTensors, as of FSDP2 and tensor parallelism: two processes, with SLOW=1 four, too, against one,
the collectives counted, with both backends; states through torch.distributed.checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_sphere_step  # noqa: F401  (mends the interpreter)
import torch
import torch.distributed as dist

import sphere_step
from sphere_step import SphereSGD

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)

SPHERES = "group", "tensor", "row"
WORLDS = [2, 4] if "SLOW" in os.environ else [2]


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def close(a, b):
    assert (full(a.detach()) - b.detach()).norm() <= 3e-6 * b.norm()


def counted(monkeypatch, calls):
    """Shapes of what is reduced, over how many ranks."""
    plain = sphere_step.all_reduce

    def all_reduce(x, group):
        calls.append((tuple(x.shape), group.size()))
        plain(x, group=group)

    monkeypatch.setattr(sphere_step, "all_reduce", all_reduce)


def against_one_process(shards, wholes, sphere, calls, expected):
    """Steps of both, along the same gradients, and the statistics; the collectives of one."""
    options = dict(lr=1e-3, sphere=sphere, momentum=0.9)
    ours, one = SphereSGD(shards, **options), SphereSGD(wholes, backend="torch", **options)
    for turn in range(3 if "SLOW" in os.environ else 2):
        for p, q in zip(shards, wholes, strict=True):
            q.grad, p.grad = torch.randn_like(q), None
            p.grad = q.grad.clone()
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        calls.clear()
        ours.step()
        if turn:  # the first looks whether the weights have moved
            assert sorted(calls) == sorted(expected), (calls, expected)
        one.step()
    for p, q in zip(shards, wholes, strict=True):
        close(p, q)
        close(ours.state[p]["momentum_buffer"], one.state[q]["momentum_buffer"])
        close(ours.state[p]["radius"], one.state[q]["radius"])
    if sphere != "row":
        for name in ("stats", "layer_stats"):
            for key, value in getattr(one, name)().items():
                assert torch.allclose(getattr(ours, name)()[key], value, rtol=1e-4, atol=1e-6)


def case_of_meshes(monkeypatch, calls):
    """Even and uneven shards, replicas, plain tensors, on one and on two dimensions."""
    world = dist.get_world_size()
    meshes = {1: init_device_mesh("cpu", (world,), mesh_dim_names=("data",))}
    places = {1: [[Shard(0)], [Shard(1)], [Replicate()], None]}
    if world == 4:
        meshes[2] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        places[2] = [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()], None]
    for dimensions, mesh in meshes.items():
        for sphere in SPHERES:
            wholes = [torch.nn.Parameter(torch.randn(5, 70)) for _ in range(4)]
            shards = []
            for whole, place in zip(wholes, places[dimensions], strict=True):
                x = whole.detach().clone()
                shards.append(torch.nn.Parameter(distribute_tensor(x, mesh, place) if place else x))
            lines = {"group": 4, "tensor": 2, "row": 5}[sphere]
            expected = [((lines, 6), world)]
            if dimensions == 2:
                on_data = {"group": 4, "tensor": 2, "row": 5}[sphere]
                rows = len(shards[0].to_local())
                on_model = {"group": 4, "tensor": 2, "row": rows}[sphere]
                expected = [((on_data, 6), 2), ((on_model, 6), 2)]
            against_one_process(shards, wholes, sphere, calls, expected)


def case_of_fully_shard(monkeypatch, calls):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for sphere in SPHERES:
        torch.manual_seed(1)
        net, one = torch.nn.Linear(6, 10), torch.nn.Linear(6, 10)
        one.load_state_dict(net.state_dict())
        fully_shard(net, mesh=mesh)

        def made(net, backend="auto", sphere=sphere):
            groups = [{"params": [net.weight]}, {"params": [net.bias], "sphere": None}]
            return SphereSGD(groups, lr=0.01, sphere=sphere, momentum=0.9, backend=backend)

        def trained(net, optimizer):
            x = torch.arange(30.0).view(5, 6).sin()
            optimizer.zero_grad()
            net(x).square().mean().backward()
            calls.clear()
            optimizer.step()

        optimizer, reference = made(net), made(one, "torch")
        for turn in range(4):
            trained(net, optimizer)
            if turn not in (0, 2):  # the first of each looks whether the weights have moved
                assert len(calls) == (0 if sphere == "row" else 1)
            trained(one, reference)
            if turn == 1:  # goes on in another optimizer, by way of a state
                state = get_optimizer_state_dict(net, optimizer)
                optimizer = made(net)
                set_optimizer_state_dict(net, optimizer, state)
        for p, q in zip(net.parameters(), one.parameters(), strict=True):
            close(p, q)


def case_of_refusals(monkeypatch, calls):
    world = dist.get_world_size()
    mesh, other = (init_device_mesh("cpu", shape) for shape in ((world,), (1, world)))
    a = torch.nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)]))
    b = torch.nn.Parameter(distribute_tensor(torch.randn(4, 4), other, [Shard(0), Shard(1)]))
    with pytest.raises(ValueError, match="several device meshes"):
        SphereSGD([a, b], lr=0.1)
    partial = torch.nn.Parameter(DTensor.from_local(torch.randn(4), mesh, [Partial()]))
    with pytest.raises(ValueError, match="parameter 0 of shape .* DTensor of partial sums"):
        SphereSGD([partial], lr=0.1)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("world", WORLDS)
def test_several_processes_step_as_one_does(world, backend, tmp_path):
    if backend == "triton" and sphere_step.triton is None:
        pytest.skip("Triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": str(int(backend == "triton"))}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent), "CUDA_VISIBLE_DEVICES": ""}
    workers = []
    for rank in range(world):
        command = [sys.executable, __file__, str(tmp_path / "store"), str(rank), str(world)]
        out = open(tmp_path / f"{rank}.txt", "w")
        workers.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
    try:
        for rank, worker in enumerate(workers):
            assert worker.wait(1800) == 0, (tmp_path / f"{rank}.txt").read_text()[-3000:]
    finally:
        for worker in workers:
            worker.kill()


def test_a_subclass_that_wraps_other_tensors_is_refused():
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    p = torch.nn.Parameter(two_tensor.TwoTensor(torch.randn(3), torch.randn(3)))
    with pytest.raises(ValueError, match="is a TwoTensor"):
        SphereSGD([p], lr=0.1)


if __name__ == "__main__":
    path, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for case in (case_of_meshes, case_of_fully_shard, case_of_refusals):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            calls = []
            counted(patch, calls)
            case(patch, calls)
    dist.destroy_process_group()
