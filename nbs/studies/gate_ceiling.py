#!/usr/bin/env python
"""What can fine-tuning reach when gates are fixed? One network, all images in one place, no federation

    python gate_ceiling.py --data cifar100.npz --weights resnet18_tinyimagenet64.safetensors --out results/gate_ceiling

Every cell is an arm x head x rate x seed. Cells that `rows.jsonl` already has are skipped, so a run can be stopped at
any time and gone on with, or shared with `--part 2/3`. Within a seed all arms see the same images in the same order
and begin with the same head.
"""
import base64, copy, dataclasses, functools, math, time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsq_nb.gating.cache import GateCache
from fedsq_nb.core import State, copy_state, load_state, rng, state_hash
from fedsq_nb.data.batches import Batches
from fedsq_nb.gating.dualcopy import DualCopy
from fedsq_nb.gating.graph import gate_function
from fedsq_nb.gating.gates import disagreement

from study_cells import Stage, answers, append_rows, computing, fingerprint, part_of, score, stored, study_parser

# --- what is run -----------------------------------------------------------------------------------------------------

ARMS = {
    'start': 'the network before any training',
    'relu': 'plain fine-tuning',
    'fixed': 'gates of the pretrained network',
    'late1': 'plain for one epoch, then both copies are what it has become and gates stay',
    'late2': 'the same after two epochs',
    'task': 'gates of a network that was fine-tuned on the task, values of the pretrained one',
    'random': 'gates of a network that never learned, values of the pretrained one'}
FREEZE_AFTER = {'late1': 1, 'late2': 2}

@dataclasses.dataclass(frozen=True)
class Settings:
    "What all cells have in common."
    train: int = 3000 # Images to train on
    valid: int = 2000 # Images held out from the rest of the train part
    size: int = 64 # Side of the images, pixels
    epochs: int = 4 # Passes over the training images
    batch: int = 64 # Images a step
    momentum: float = 0.9 # Momentum of SGD
    task_rate: float = 0.01 # Rate at which the network with task gates was fine-tuned, from the ridge head
    precision: str = 'bfloat16' # Type that layers compute in; weights are float32

class Cell(NamedTuple):
    "One training."
    arm: str # One of `ARMS`
    head: str # 'ridge' or 'random'
    rate: float # Learning rate of the first step; it falls linearly to zero
    seed: int # Of images, head and order

# Those that decide most first
RATES = {'ridge': (0.003, 0.001, 0.01, 0.0003, 0.03, 0.0001), 'random': (0.03, 0.01, 0.1, 0.003)}

def plan(
    seeds: int, # How many seeds
) -> Iterator[Cell]:
    "All cells, those that decide most first."
    plain, late, controls = ('relu', 'fixed'), ('late2', 'late1'), ('task', 'random')
    for seed in range(seeds):
        for head in RATES: yield Cell('start', head, 0., seed)
        yield from block(seed, plain, 0, 2)
    for arms, first, last in ((late, 0, 2), (plain, 2, 6), (controls, 0, 2), (late, 2, 3)):
        for seed in range(seeds): yield from block(seed, arms, first, last)

def block(
    seed: int, # Which seed
    arms: Sequence[str], # Side by side
    first: int, # Which of `RATES`, from here
    last: int, # Up to but not including this one
) -> Iterator[Cell]:
    "Some arms of a seed at several rates."
    for i in range(first, last):
        for head, rates in RATES.items():
            for arm in arms:
                if i < len(rates): yield Cell(arm, head, rates[i], seed)

# --- one cell --------------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=1)
def tuned(
    stage: Stage, # What the cells of this seed share
    settings: Settings, # What all cells share
) -> State:
    "A network that has learned the task by plain fine-tuning from the ridge head."
    course = Course(stage, settings, Cell('relu', 'ridge', settings.task_rate, stage.seed))
    for epoch in range(settings.epochs): course.epoch(epoch)
    return copy_state(course.model.state_dict())

def order(
    stage: Stage, # What the cells of this seed share
    settings: Settings, # What all cells share
    epoch: int, # From 0
    gates: GateCache | None, # Stored gates of the training images
) -> Batches: # Training images in the order of that epoch, the same for every arm
    "What an epoch trains on."
    shuffle = rng(stage.seed, 'epoch', epoch)
    return stage.batches('train', batch_size=settings.batch, stored_gates=gates, shuffle=shuffle)

def gated_by(
    net: nn.Module, # What is trained
    decides: State, # Weights of the network that decides
) -> DualCopy:
    "`net` with another network's gates."
    deciding = copy.deepcopy(net)
    deciding.load_state_dict(decides)
    dc = DualCopy(deciding)
    dc.quantitative.load_state_dict(net.state_dict())
    return dc

class Course:
    "One network on its way through the epochs."
    def __init__(self,
        stage: Stage, # What the cells of this seed share
        settings: Settings, # What all cells share
        cell: Cell, # What is trained
    ):
        self.stage, self.settings, self.cell, self.gates = stage, settings, cell, {}
        net = stage.start(cell.head)
        if cell.arm == 'fixed':
            own = {part: stage.own_gates(part) for part in ('train', 'valid', 'test')}
            self.fix(DualCopy(net), own)
        elif cell.arm == 'task': self.fix(gated_by(net, tuned(stage, settings)))
        elif cell.arm == 'random': self.fix(gated_by(net, stage.net('random').state_dict()))
        else: self.model, self.first = net, copy.deepcopy(net)
        self.optimise()

    def fix(self, dc: DualCopy, gates: dict[str, GateCache] | None = None) -> None: # `dc` is trained from now on
        self.model = dc
        self.gates = gates or {'train': self.stage.gates(dc, 'train')}

    def optimise(self, state: dict | None = None) -> None: # Fresh SGD, or with momenta of an earlier one
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.opt = torch.optim.SGD(trained, lr=self.cell.rate, momentum=self.settings.momentum)
        if state: self.opt.load_state_dict(state)

    def freeze(self) -> None: # Both copies become what the network is now; its answers do not change
        self.fix(DualCopy(self.model))
        self.optimise(self.opt.state_dict())

    def epoch(self, epoch: int) -> float: # Mean training loss; NaN as soon as one is not finite
        if FREEZE_AFTER.get(self.cell.arm) == epoch: self.freeze()
        batches = order(self.stage, self.settings, epoch, self.gates.get('train'))
        steps, total, n = self.settings.epochs*len(batches), 0., 0
        self.model.train()
        for i, (x, *gates, y) in enumerate(batches):
            self.opt.param_groups[0]['lr'] = self.cell.rate * (1 - (epoch*len(batches) + i)/steps)
            x = x.to(memory_format=torch.channels_last)
            with computing(self.settings.precision, self.stage.device): out = self.model(x, *gates)
            loss = F.cross_entropy(out.float(), y)
            if not math.isfinite(loss.item()): return math.nan
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
            total, n = total + loss.item()*len(y), n + len(y)
        return total / n

    def judge(self, part: str) -> tuple[Tensor, Tensor]: # Logits and labels
        return answers(self.model, self.stage.batches(part, stored_gates=self.gates.get(part)), self.settings.precision)

    @torch.no_grad()
    def moved(self, images: int = 500) -> dict[str, float]: # By site, how many units would decide otherwise by now
        batches = self.stage.batches('valid', batch_size=images)
        x = next(iter(batches))[0].to(memory_format=torch.channels_last)
        self.model.eval()
        with computing(self.settings.precision, self.stage.device):
            if isinstance(self.model, DualCopy):
                fixed = self.model.gates(x)
                now = self.model.own_gates(x, fixed)
            else:
                decide = gate_function(self.model)
                fixed, now = decide(self.first, x), decide(self.model, x)
        return {site: round(share, 5) for site, share in disagreement(fixed, now).items()}

def packed(
    right: Tensor, # bool (n,)
) -> str: # One bit an image, base64
    "Which images a network is right on, short enough for a row."
    return base64.b64encode(np.packbits(right.numpy())).decode()

def run(
    stage: Stage, # What the cells of this seed share
    settings: Settings, # What all cells share
    cell: Cell, # What to train
) -> list[dict]: # A row an epoch; the test part is seen once, at the end
    "Train one cell."
    rows, began, course = [], time.perf_counter(), Course(stage, settings, cell)
    last = 0 if cell.arm == 'start' else settings.epochs
    for epoch in range(last + 1):
        loss = course.epoch(epoch - 1) if epoch else None
        if epoch == 0 and last: continue
        row = dict.fromkeys(('train_loss', 'valid_accuracy', 'valid_loss', 'test_accuracy', 'test_loss'))
        row |= dict(epoch=epoch, state='ok')
        if loss is None or math.isfinite(loss):
            row['train_loss'] = loss and round(loss, 5)
            row['valid_accuracy'], row['valid_loss'] = score(*course.judge('valid'))
        if row['valid_accuracy'] is None: row['state'] = 'diverged'
        elif epoch == last:
            logits, labels = course.judge('test')
            row['test_accuracy'], row['test_loss'] = score(logits, labels)
            row['test_right'] = packed(logits.argmax(1) == labels)
            row['moved'] = course.moved()
        rows.append(row | {'seconds': round(time.perf_counter() - began, 1)})
        if row['state'] == 'diverged': break
    return rows

# --- the study -------------------------------------------------------------------------------------------------------

def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument('--arms', default=','.join(ARMS), help='arms to run, with commas between')
    parser.add_argument('--rates', default='', help='rates to run, with commas between; by default all')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings, path, stage = Settings(precision=args.precision), args.out/'rows.jsonl', None
    source = {'data': Path(args.data).name, 'weights': state_hash(load_state(args.weights))}
    rates = [float(rate) for rate in args.rates.split(',') if rate]
    cells = [c for c in plan(args.seeds) if c.arm in args.arms.split(',') and (not rates or c.rate in rates)]
    for cell in part_of(cells, args.part):
        name = fingerprint(cell._asdict() | dataclasses.asdict(settings) | source)
        if name in stored(path): continue
        if stage is None or stage.seed != cell.seed:
            shape = settings.train, settings.valid, settings.size, settings.precision, args.device
            stage = Stage(cell.seed, args.data, args.weights, *shape)
        rows = run(stage, settings, cell)
        rows[0]['settings'] = dataclasses.asdict(settings) | source | {'device': args.device, 'threads': args.threads}
        if cell.head == 'ridge': rows[0]['ridge'] = stage.ridge[1]
        append_rows(path, [{'cell': name} | cell._asdict() | row for row in rows])
        print(*cell, *(rows[-1][k] for k in ('state', 'valid_accuracy', 'test_accuracy', 'seconds')), flush=True)

if __name__ == '__main__': main()
