"""What the studies of this folder share: cells that are stored once, a warm start, and how a network is asked"""
import argparse, contextlib, dataclasses, functools, hashlib, json, os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsq_nb.data.images import Format
from fedsq_nb.client.backbones import backbone, head_name, image_format
from fedsq_nb.client.heads import best_ridge_head, head_sums
from fedsq_nb.gating.cache import GateCache, gate_cache
from fedsq_nb.core import State, rng
from fedsq_nb.data.batches import Batches
from fedsq_nb.data.images import ImageSet, Splits, thin
from fedsq_nb.data.sources import load_data
from fedsq_nb.gating.dualcopy import DualCopy

# --- cells -----------------------------------------------------------------------------------------------------------

def fingerprint(
    settings: dict, # Everything that decides what a cell's rows will say
) -> str: # 16 hexadecimal digits
    "The name under which a cell's rows are stored."
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

def read_rows(
    path: str | os.PathLike, # A .jsonl file, which need not exist yet
) -> list[dict]: # A line that was cut short is left out
    "The rows of a study."
    rows = []
    for line in Path(path).read_bytes().split(b'\n') if Path(path).exists() else []:
        with contextlib.suppress(ValueError): rows.append(json.loads(line))
    return rows

def stored(
    path: str | os.PathLike, # A .jsonl file, which need not exist yet
) -> set[str]: # Fingerprints
    "The cells that a study already has."
    return {row['cell'] for row in read_rows(path)}

def append_rows(
    path: str | os.PathLike, # A .jsonl file, made if need be
    rows: Sequence[dict], # All rows of a cell
) -> None:
    "Append a cell in a single write, so that it is there as a whole or not at all."
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    with open(path, 'ab', buffering=0) as f: f.write(text.encode())

def part_of(
    cells: Sequence, # In the order in which they should run
    part: str, # '2/5': the second of five machines
) -> list: # Every fifth cell
    "The cells of one machine."
    mine, of = map(int, part.split('/'))
    if not 1 <= mine <= of: raise ValueError(f'part {part!r} must be i/n with i from 1 to n')
    return list(cells[mine - 1::of])

def study_parser(
    doc: str, # The script's docstring, whose first line says what it does
) -> argparse.ArgumentParser:
    "The options that every study has."
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument('--data', required=True, help='CIFAR-100 as .npz with x_train, y_train, x_test, y_test')
    parser.add_argument('--weights', required=True, help='ResNet18, a safetensors file')
    parser.add_argument('--out', required=True, type=Path, help='folder of rows.jsonl')
    parser.add_argument('--seeds', type=int, default=3, help='how many seeds, from 0')
    parser.add_argument('--part', default='1/1', help='i/n: every n-th cell, from the i-th on')
    parser.add_argument('--precision', default='bfloat16', choices=list(PRECISIONS))
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--device', default='cpu')
    return parser

# --- how a network is asked ------------------------------------------------------------------------------------------

PRECISIONS = {'float32': torch.float32, 'bfloat16': torch.bfloat16}

def computing(
    precision: str, # 'float32' or 'bfloat16'
    device: str = 'cpu', # Where
) -> contextlib.AbstractContextManager:
    "Layers compute in `precision` within the block; weights, losses and sums stay in float32."
    return torch.autocast(torch.device(device).type, PRECISIONS[precision], enabled=precision != 'float32')

def shown(
    data: ImageSet, # Images
    form: Format, # How they are shown to the network
    **kwargs, # As in `Batches`
) -> Batches:
    "Images in batches of 250 unless `batch_size` says otherwise."
    return Batches(data, form, **dict(batch_size=250) | kwargs)

@torch.no_grad()
def answers(
    model: nn.Module, # A plain network or a `DualCopy`, in either mode
    batches: Batches, # Images, with their gates or without
    precision: str, # Type that layers compute in
) -> tuple[Tensor, Tensor]: # Logits float32 (n, classes) and labels int64 (n,), on the CPU
    "What a network says about all images."
    model.eval()
    logits, labels = [], []
    for x, *gates, y in batches:
        with computing(precision, x.device): out = model(x.to(memory_format=torch.channels_last), *gates)
        logits.append(out.float().cpu())
        labels.append(y.cpu())
    return torch.cat(logits), torch.cat(labels)

def score(
    logits: Tensor, # float (n, classes)
    labels: Tensor, # int64 (n,)
) -> tuple[float | None, float | None]: # Accuracy in 0..1 and mean cross-entropy in nats; None when it is not finite
    "How good answers are."
    loss = F.cross_entropy(logits.double(), labels).item()
    if not torch.isfinite(torch.tensor(loss)): return None, None
    return (logits.argmax(1) == labels).double().mean().item(), round(loss, 5)

# --- a warm start ----------------------------------------------------------------------------------------------------

def pretrained(
    weights: str, # A safetensors file, or 'random'
    n_classes: int, # Outputs of the new head
    seed: int, # Seed of the head
) -> nn.Module: # ResNet18 with frozen statistics, channels last
    "The network that every cell begins with; its head is random."
    return backbone('resnet18', n_classes, weights=weights, seed=seed).to(memory_format=torch.channels_last)

def features(
    net: nn.Module, # A plain network
    batches: Batches, # Images
    precision: str, # Type that layers compute in
) -> tuple[Tensor, Tensor]: # What arrives at the head float64 (n, d), and labels
    "The representation that a head would be fitted on."
    seen = []
    head = net.get_submodule(head_name(net))
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double().cpu()))
    try: labels = answers(net, batches, precision)[1]
    finally: hook.remove()
    return torch.cat(seen), labels

def ridge_head(
    net: nn.Module, # A plain network
    train: Batches, # Images to fit on
    valid: Batches, # Images that choose the penalty by accuracy and the temperature by cross-entropy
    precision: str, # Type that layers compute in
    n_classes: int, # How many classes there are
) -> tuple[State, dict]: # 'weight' and 'bias' float32, and what was chosen
    "The ridge head of a network's features, as `client.heads` solves it."
    sums = head_sums(*features(net, train, precision), n_classes)
    head, chosen = best_ridge_head(sums, *features(net, valid, precision))
    return head, {'valid_accuracy' if name == 'accuracy' else name: value for name, value in chosen.items()}

def with_head(
    net: nn.Module, # A plain network, changed in place
    head: State | None, # 'weight' and 'bias'; None leaves the head as it is
) -> nn.Module: # `net`
    "Give a network a head."
    if head: net.get_submodule(head_name(net)).load_state_dict(head)
    return net

# --- what the cells of a seed share ----------------------------------------------------------------------------------

@dataclasses.dataclass(eq=False)
class Stage:
    "Images, heads and gates of one seed, each made when it is first asked for."
    seed: int # Draws images and heads
    data: str # An .npz file
    weights: str # A safetensors file
    train: int # Images to train on
    valid: int # Images held out from the rest of the train part
    size: int # Side of the images, pixels
    precision: str # Type that layers compute in
    device: str = 'cpu' # Where to compute
    test: int | None = None # Test images, the same for every seed; by default all

    @functools.cached_property
    def splits(self) -> Splits:
        options = dict(size=self.size, max_train=self.train, seed=self.seed)
        with np.load(self.data) as arrays: held_out = self.valid / len(arrays['y_train'])
        splits = load_data(self.data, valid_fraction=held_out, **options)
        assert (len(splits.train), len(splits.valid)) == (self.train, self.valid)
        if self.test is None: return splits
        return dataclasses.replace(splits, test=thin(splits.test, self.test, rng(0, 'test images')))

    @property
    def form(self) -> Format: return image_format('resnet18')._replace(size=self.size)

    def batches(self, part: str, **kwargs) -> Batches: # part: 'train', 'valid' or 'test'
        return shown(getattr(self.splits, part), self.form, device=self.device, **kwargs)

    def net(self, weights: str, head: State | None = None) -> nn.Module: # `head` None: a random one
        return with_head(pretrained(weights, len(self.splits.train.classes), self.seed), head).to(self.device)

    @functools.cached_property
    def ridge(self) -> tuple[State, dict]: # The head, and what was chosen for it
        net, classes = self.net(self.weights), len(self.splits.train.classes)
        return ridge_head(net, self.batches('train'), self.batches('valid'), self.precision, classes)

    def start(self, head: str) -> nn.Module: # The network that a cell begins with
        return self.net(self.weights, self.ridge[0] if head == 'ridge' else None)

    def gates(self, dc: DualCopy, part: str) -> GateCache: # All gates of a part, one bit each
        with computing(self.precision, self.device): return gate_cache(dc, self.batches(part))

    @functools.cached_property
    def _own(self) -> dict[str, GateCache]: return {}

    def own_gates(self, part: str) -> GateCache: # Gates of the pretrained network
        if part not in self._own: self._own[part] = self.gates(DualCopy(self.start('random')), part)
        return self._own[part]
