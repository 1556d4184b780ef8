"""DTensors, as of FSDP2 and tensor parallelism: four processes against one, with both backends, the
collectives counted; states through torch.distributed.checkpoint; ZeRO's partitions."""

import os
import signal
import sys
import traceback
from functools import partial
from itertools import product

import pytest
import spheres  # mends the interpreter
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
from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: E402
from torch.distributed.tensor import (  # noqa: E402
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module  # noqa: E402

SPHERES = "group", "tensor", "row"
SLOW = "SLOW" in os.environ


def parameter(x):
    return torch.nn.Parameter(x.clone())


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def close(a, b):
    assert (full(a.detach()) - b.detach()).norm() <= 3e-6 * b.norm()


def against_one_process(shards, wholes, sphere, backend, calls, expected):
    """Steps of both, along the same gradients, and the statistics; the collectives of one."""
    options = dict(lr=1e-3, sphere=sphere, momentum=0.9)
    ours = SphereSGD(shards, backend=backend, **options)
    one = SphereSGD(wholes, backend="torch", **options)
    for _ in range(2 if backend == "torch" or SLOW else 1):
        for p, q in zip(shards, wholes, strict=True):
            q.grad, p.grad = torch.randn_like(q), None
            p.grad = q.grad.clone()
            if isinstance(p, DTensor):
                p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        calls.clear()
        ours.step()
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


def case_of_meshes(backend, calls):
    """Even and uneven shards, replicas, plain tensors, on one and on two dimensions."""
    world = dist.get_world_size()
    meshes = {1: init_device_mesh("cpu", (world,), mesh_dim_names=("data",))}
    places = {1: [[Shard(0)], [Shard(1)], [Replicate()], None]}
    if world == 4:
        meshes[2] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        places[2] = [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Shard(1), Replicate()], None]
    for (dimensions, mesh), sphere in product(meshes.items(), SPHERES):
        # Of the kernels one case, as their interpreter is slow; joint spheres are below.
        case = dimensions, sphere
        if SLOW or (case != (1, "tensor") if backend == "torch" else case == (2, "row")):
            wholes = [torch.nn.Parameter(torch.randn(5, 70)) for _ in range(4)]
            shards = []
            for whole, place in zip(wholes, places[dimensions], strict=True):
                x = whole.detach().clone()
                if place:
                    x = distribute_tensor(x, mesh, place)
                    x = x.clone(memory_format=torch.contiguous_format)  # torch 2.7 leaves holes
                shards.append(torch.nn.Parameter(x))
            lines = {"group": 4, "tensor": 2, "row": 5}[sphere]
            expected = [((lines, 6), world)]
            if dimensions == 2:
                of_model = len(shards[0].to_local()) if sphere == "row" else lines
                expected = [((lines, 6), 2), ((of_model, 6), 2)]
            against_one_process(shards, wholes, sphere, backend, calls, expected)


def case_of_fully_shard(backend, calls):
    """Alone, and over tensor parallelism: its shards of rows are strided."""
    world = dist.get_world_size()
    meshes = [init_device_mesh("cpu", (world,))]
    if world == 4:
        meshes.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model")))
    cases = [*product(meshes[-1:], SPHERES), (meshes[0], "row")]
    for mesh, sphere in cases if backend == "torch" or SLOW else cases[:1]:
        rows = 12 if mesh.ndim == 2 else 10  # torch 2.7 strides even shards only
        net, one = torch.nn.Linear(6, rows), torch.nn.Linear(6, rows)
        one.load_state_dict(net.state_dict())
        if mesh.ndim == 2:
            parallelize_module(net, mesh["model"], ColwiseParallel())
        fully_shard(net, mesh=mesh["data"] if mesh.ndim == 2 else mesh)

        def made(net, backend, sphere=sphere):
            groups = [{"params": [net.weight]}, {"params": [net.bias], "sphere": None}]
            return SphereSGD(groups, lr=0.01, sphere=sphere, momentum=0.9, backend=backend)

        def trained(net, optimizer, one):
            x = torch.arange(30.0).view(5, 6).sin()
            optimizer.zero_grad()
            net(x).square().mean().backward()
            for p, q in zip(net.parameters(), one.parameters(), strict=True):
                q.grad = full(p.grad)  # torch 2.7 adds over the ranks of gloo, and takes no mean
            calls.clear()
            optimizer.step()

        optimizer, reference = made(net, backend), made(one, "torch")
        for turn in range(4):
            trained(net, optimizer, one)
            assert len(calls) == (0 if sphere == "row" else mesh.ndim)
            reference.step()
            if turn == 1:  # goes on in another optimizer, by way of a state
                state = get_optimizer_state_dict(net, optimizer)
                optimizer = made(net, backend)
                set_optimizer_state_dict(net, optimizer, state)
        for p, q in zip(net.parameters(), one.parameters(), strict=True):
            close(p, q)
            for name, value in reference.state[q].items():  # whole, as in a checkpoint
                close(optimizer.state[p][name], value)


def case_of_pace(backend, calls):
    """Where rows are shared out and turn by an angle, what is on no sphere steps alike on all ranks,
    by the median of their medians. The last of four has no row."""
    world, w, g = dist.get_world_size(), torch.randn(6, 5), torch.randn(6, 5)
    mesh = init_device_mesh("cpu", (world,))
    p, bias = torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])), parameter(torch.ones(3))
    q, other = parameter(w), parameter(torch.ones(3))
    p.grad, q.grad = distribute_tensor(g, mesh, [Shard(0)]), g.clone()
    bias.grad, other.grad = torch.ones(3), torch.ones(3)
    ours, one = (
        SphereSGD([{"params": [x]}, {"params": [y], "sphere": None}], lr=0.1, sphere="row",
                  angle=True, backend=how)
        for x, y, how in ((p, bias, backend), (q, other, "torch"))
    )  # fmt: skip
    calls.clear()
    ours.step()
    one.step()
    assert calls == [((world,), world)]
    close(p, q)
    stats = one.stats()
    paces = stats["elr"] * stats["radius"] ** 2
    medians = torch.stack([x.median() for x in paces.chunk(world)])
    close(bias, 1 - medians.median() * other.grad)


def case_of_empty_shards(backend, calls):
    """A rank that has nothing of a sphere knows its rule, and steps what is on none alike."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    wholes, rest = [torch.randn(1, 6), torch.randn(5, 6), torch.randn(1, 6)], torch.ones(3)
    ours = [torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in wholes]
    one, bias, other = [parameter(w) for w in wholes], parameter(rest), parameter(rest)
    for p, q in zip(ours, one, strict=True):
        q.grad = torch.randn_like(q)
        p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
    bias.grad, other.grad = torch.ones(3), torch.ones(3)
    steps = []
    for params, plain, how in ((ours, bias, backend), (one, other, "torch")):
        groups = [{"params": params}, {"params": [plain], "sphere": None}]
        steps.append(SphereSGD(groups, lr=0.1, sphere="tensor", angle=True, backend=how))
        steps[-1].step()
    for p, q in zip([*ours, bias], [*one, other], strict=True):
        close(p, q)
    stats, expected = (step.stats() for step in steps)
    for name in ("radius", "elr", "grad_norm", "angle"):
        close(stats[name], expected[name])


def case_of_zero(backend, calls):
    """Each rank has some of the tensors; radii stay with theirs, in a state as well."""
    if backend == "triton" and not SLOW:
        return
    wholes = [torch.nn.Parameter(scale * torch.randn(4, 3)) for scale in (1.0, 3.0, 10.0, 0.1, 5.0)]
    own = [torch.nn.Parameter(p.detach().clone()) for p in wholes]
    options = dict(lr=0.01, sphere="tensor", momentum=0.9)

    def made(params):
        return ZeroRedundancyOptimizer(params, partial(SphereSGD, backend=backend), **options)

    optimizer, one = made(own), SphereSGD(wholes, backend="torch", **options)
    for turn in range(4):
        for p, q in zip(own, wholes, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone()
        optimizer.step()
        one.step()
        if turn == 1:
            optimizer.consolidate_state_dict(0)
            state = [optimizer.state_dict() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(state)
            own = [torch.nn.Parameter(2 * p.detach()) for p in own]  # radii of before, till then
            optimizer = made(own)
            optimizer.load_state_dict(state[0])
            for p, q in zip(own, wholes, strict=True):
                p.data.copy_(q)
    for p, q in zip(own, wholes, strict=True):
        close(p, q)


def case_of_momentum(backend, calls):
    """One that is placed otherwise, though of the same shape on each rank; one that is no DTensor
    is refused, and kept."""
    if dist.get_world_size() < 4 or backend == "triton" and not SLOW:
        return
    mesh = init_device_mesh("cpu", (2, 2))
    w, g, m = torch.randn(3, 6, 4)
    p, q = torch.nn.Parameter(distribute_tensor(w, mesh, [Shard(0), Replicate()])), parameter(w)
    p.grad, q.grad = distribute_tensor(g, mesh, [Shard(0), Replicate()]), g.clone()
    ours, one = (
        SphereSGD([x], lr=0.01, momentum=0.9, backend=how)
        for x, how in ((p, backend), (q, "torch"))
    )
    ours.state[p]["momentum_buffer"] = distribute_tensor(m, mesh, [Replicate(), Shard(0)])
    one.state[q]["momentum_buffer"] = m.clone()
    ours.step()
    one.step()
    close(p, q)
    ours.state[p]["momentum_buffer"] = plain = m.clone()
    for _ in range(2):
        with pytest.raises(ValueError, match="or its momentum_buffer is a DTensor, not both"):
            ours.step()
        assert ours.state[p]["momentum_buffer"] is plain
    close(p, q)


def case_of_refusals(backend, calls):
    world = dist.get_world_size()
    mesh, other = (init_device_mesh("cpu", shape) for shape in ((world,), (1, world)))
    a = torch.nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(0)]))
    b = torch.nn.Parameter(distribute_tensor(torch.randn(4, 4), other, [Shard(0), Shard(1)]))
    with pytest.raises(ValueError, match="several device meshes"):
        SphereSGD([a, b], lr=0.1)
    partial = torch.nn.Parameter(DTensor.from_local(torch.randn(4), mesh, [Partial()]))
    with pytest.raises(ValueError, match="parameter 0 of shape .* is a DTensor of Partial"):
        SphereSGD([partial], lr=0.1)


CASES = [
    case_of_meshes,
    case_of_fully_shard,
    case_of_pace,
    case_of_empty_shards,
    case_of_zero,
    case_of_momentum,
    case_of_refusals,
]


@pytest.mark.skipif(
    sphere_step.triton is not None and not spheres.INTERPRET,
    reason="test_kernels.py runs it, with Triton's interpreter",
)
@pytest.mark.parametrize("world", [2, 4] if SLOW else [4])
def test_several_processes_step_as_one_does(world, tmp_path, capfd):
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            signal.alarm(300)  # collectives that do not match wait for half an hour
            try:
                rank_of(str(tmp_path / "store"), rank, world)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(1)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), capfd.readouterr().err[-5000:]


def test_a_subclass_that_wraps_other_tensors_is_refused():
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    p = torch.nn.Parameter(two_tensor.TwoTensor(torch.randn(3), torch.randn(3)))
    with pytest.raises(ValueError, match="is a TwoTensor"):
        SphereSGD([p], lr=0.1)


def rank_of(path, rank, world):
    torch.set_num_threads(1)  # makes the pool, which a fork loses, before two threads do at a time
    dist.init_process_group("gloo", store=dist.FileStore(path, world), rank=rank, world_size=world)
    calls, plain = [], sphere_step.all_reduce

    def counted(x, group):
        calls.append((tuple(x.shape), group.size()))
        plain(x, group=group)

    sphere_step.all_reduce = counted
    for backend in ["torch", "triton"] if sphere_step.triton else ["torch"]:
        for case in CASES:
            torch.manual_seed(0)
            case(backend, calls)
    dist.destroy_process_group()
