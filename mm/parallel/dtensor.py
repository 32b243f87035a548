"""Full tensors and norms of tensors that may be sharded over ranks. Every rank with a shard must call these."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with the shards of all ranks; one that is not sharded comes back as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; one that is not sharded comes back as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def squared_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Scalars [], whose sum is the squared norm of several tensors taken as one vector, however each is sharded."""
    groups: dict[tuple[DeviceMesh, tuple[bool, ...]] | None, list[Tensor]] = {}
    for tensor in tensors:
        key = None
        if isinstance(tensor, DTensor):
            key = (tensor.device_mesh, tuple(placement.is_replicate() for placement in tensor.placements))
        groups.setdefault(key, []).append(local_tensor(tensor))
    squares = []
    for key, local_tensors in groups.items():
        square = nn.utils.get_total_norm(local_tensors).square()
        if key is not None:
            mesh, is_replicated = key
            placements = [Replicate() if replicated else Partial() for replicated in is_replicated]
            square = full_tensor(DTensor.from_local(square, mesh, placements))
        squares.append(square)
    return squares
