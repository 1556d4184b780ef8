"""Parameters that are not plain tensors, as of FSDP2 and tensor parallelism: refused in a clear line where
they are on a sphere, and torch's own SGD where not."""

import pytest
import torch
import torch.distributed as dist

from sphere_step import SphereSGD

if not dist.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402


@pytest.fixture
def mesh(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("sphere", ["group", "tensor", "row"])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_a_dtensor_on_a_sphere_is_refused_by_number(mesh, sphere, placement):
    plain = torch.nn.Parameter(torch.randn(4, 3))
    spread = torch.nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [placement]))
    message = r"parameter 1 of shape \(4, 6\) is a DTensor: a sphere takes plain tensors, no shards"
    with pytest.raises(ValueError, match=message):
        SphereSGD([plain, spread], lr=0.1, sphere=sphere)


def test_a_network_under_fully_shard_is_refused_and_its_rest_trains_by_sgd(mesh):
    net, ours = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    ours.load_state_dict(net.state_dict())
    fully_shard(net, mesh=mesh)
    with pytest.raises(ValueError, match="is a DTensor"):
        SphereSGD(net.parameters(), lr=0.1)
    sharded = SphereSGD(net.parameters(), lr=0.1, sphere=None, momentum=0.9)
    plain = SphereSGD(ours.parameters(), lr=0.1, sphere=None, momentum=0.9)
    for _ in range(3):
        x = torch.randn(5, 3)
        for each, optimizer in ((net, sharded), (ours, plain)):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(net.parameters(), ours.parameters(), strict=True):
        assert torch.allclose(p.full_tensor(), q)


def test_a_subclass_that_wraps_other_tensors_is_refused():
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    p = torch.nn.Parameter(two_tensor.TwoTensor(torch.randn(3), torch.randn(3)))
    with pytest.raises(ValueError, match="is a TwoTensor"):
        SphereSGD([p], lr=0.1)
