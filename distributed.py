"""The processes of a run: how they find each other, what they tell each other, how they stop.

    torchrun --nproc_per_node 4 train.py ...        four processes; python train.py: one, for which all of this is free

What they tell each other here is small (counts, sums, a flag, detections) and goes between CPUs, so that no GPU waits
for it; gradients are DistributedDataParallel's. `everyone`, `gather`, `broadcast` and `share_buffers` must be called
by all processes alike: where one does not come, the others wait for it.
"""
import os
import signal

import torch
import torch.distributed as dist

from variants import ConfigError


def start():
    """Meet the other processes that torchrun started, if it did."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def stop():
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def left_alone(error):
    """Whether an error only says that another process is gone, which has said why, or was killed."""
    return world() > 1 and any(word in str(error) for word in ("closed by peer", "reset by peer", "Broken pipe"))


def rank():
    """This process's number; 0 writes files and speaks to people."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(name):
    """torch.device of a command line's --device; of several processes each gets the GPU of its number on its machine.

    Raises ConfigError where there is none of that name, and where several processes are to share "cuda:1".
    """
    if world() > 1 and name.startswith("cuda:"):
        raise ConfigError(f"--device {name} is one GPU, and torchrun started {world()} processes: write --device cuda")
    if world() > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name}: torch cannot use it here ({str(error).splitlines()[0]}); leave --device "
                          "away, or install a torch build that fits your driver") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)                                  # where code that names no GPU works
    return device


def everyone(numbers):
    """The lists of all processes as one list; every process must bring equally many numbers."""
    if world() == 1:
        return numbers
    mine = torch.tensor(numbers, dtype=torch.float64)
    parts = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(parts, mine)
    return torch.cat(parts).tolist()


def sums(values):
    """{name: number} -> the same with each number's sum over all processes."""
    rows = torch.tensor(everyone(list(values.values())), dtype=torch.float64).view(-1, len(values))
    return dict(zip(values, rows.sum(0).tolist()))


def gather(thing):
    """Any object of every process -> on process 0 a list of them, on the others None."""
    if world() == 1:
        return [thing]
    things = [None] * world() if rank() == 0 else None
    dist.gather_object(thing, things)
    return things


def broadcast(thing):
    """Process 0's object, on all."""
    if world() == 1:
        return thing
    things = [thing]
    dist.broadcast_object_list(things)
    return things[0]


def share_buffers(model):
    """Give every process process 0's buffers: batch norm's statistics, which each takes from its own images."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def catch_signals():
    """Let Ctrl-C and SIGTERM wait for the step in progress; a second one stops at once.

    Returns a function that says whether one came, to any process, and one that puts the old handlers back.
    """
    came = []

    def note(number, frame):
        if came:
            raise KeyboardInterrupt
        came.append(number)

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    return lambda: any(everyone([bool(came)])), lambda: [signal.signal(s, handler) for s, handler in old.items()]
