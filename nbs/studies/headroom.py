#!/usr/bin/env python
"""Has an averaging method anything to win? The averaged model against its clients, and the parts of the averaging gap

    python headroom.py --data cifar100.npz --weights resnet18_tinyimagenet64.safetensors --out results/headroom

Every cell is a method x head x partition x local epochs x rate x seed. Cells that `rows.jsonl` already has are
skipped, so a run can be stopped at any time and gone on with, or shared with `--part 2/3`. Within a seed all methods
see the same images, partition, head and order.
"""
import copy, dataclasses, itertools, time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedsq_nb.server.aggregate import screen_updates, client_drift, weighted_mean
from fedsq_nb.core import State, Update, load_state, state_hash
from fedsq_nb.gating.dualcopy import DualCopy
from fedsq_nb.client.learner import LocalTraining, shared_state, trained_copy
from fedsq_nb.data.partition import dirichlet, iid

from study_cells import PRECISIONS, Stage, answers, append_rows, fingerprint, part_of, score, stored, study_parser

# --- what is run -----------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Settings:
    "What all cells have in common."
    train: int = 3000 # Images that the clients share
    valid: int = 2000 # Images held out from the rest of the train part
    test: int = 5000 # Test images, the same for every seed
    probe: int = 128 # Of the validation images, how many the averaging gap is measured on
    size: int = 64 # Side of the images, pixels
    clients: int = 10 # All of them in every round
    min_size: int = 10 # Images that every client has at least
    rounds: int = 3 # Rounds
    measured: tuple[int, ...] = (1, 3) # Rounds at which clients are asked too
    batch: int = 64 # Images a step
    momentum: float = 0.9 # Momentum of SGD
    precision: str = 'bfloat16' # Type that layers compute in; weights are float32, and so is the averaging gap

class Cell(NamedTuple):
    "One federation."
    method: str # 'fedavg' or 'fedsq'
    head: str # 'ridge' or 'random'
    alpha: float # Of Dirichlet; 0 stands for equal random shares
    epochs: int # Local epochs
    rate: float # Learning rate of the clients
    seed: int # Of images, partition, head and order

RATES = {'ridge': (0.003, 0.001, 0.01), 'random': (0.01, 0.03, 0.003)} # Those that decide most first

def plan(
    seeds: int, # How many seeds
) -> Iterator[Cell]:
    "All cells, those that decide most first."
    for alpha in (0.1, 0.):
        for seed in range(seeds):
            for i, epochs, head, method in itertools.product(range(3), (5, 1), RATES, ('fedavg', 'fedsq')):
                yield Cell(method, head, alpha, epochs, RATES[head][i], seed)

# --- the averaging gap and its parts ---------------------------------------------------------------------------------

BLOCKS = ('stem', 'layer1', 'layer2', 'layer3', 'layer4', 'head')

def block_of(
    name: str, # A tensor of ResNet18
) -> str: # One of `BLOCKS`
    "The block that a tensor belongs to."
    top = name.split('.')[0]
    return {'conv1': 'stem', 'bn1': 'stem', 'fc': 'head'}.get(top, top)

def only(
    state: State, # A trained model
    start: State, # Where it began
    blocks: Sequence[str], # Those that moved
) -> State:
    "The model in which some blocks were trained and the others were not."
    return {n: state[n] if block_of(n) in blocks else start[n] for n in start}

def asking(
    net: nn.Module, # A plain network or a `DualCopy`
    x: Tensor, # Images (b, c, h, w)
    gates: tuple = (), # Their gates, for a `DualCopy`
) -> Callable[[State], Tensor]: # Weights -> logits float64 (b, classes), less their mean over classes
    "A network as a function of its weights."
    net = copy.deepcopy(net).eval()
    tensors = trained_copy(net).state_dict()
    @torch.no_grad()
    def ask(state):
        for n, value in state.items(): tensors[n].copy_(value)
        logits = net(x, *gates).double()
        return logits - logits.mean(1, keepdim=True)
    return ask

def gap_of(
    ask: Callable[[State], Tensor], # A network as a function of its weights
    states: Sequence[State], # One a client
    weights: Sequence[float], # Shares of the clients, with sum 1
) -> Tensor: # (b, classes)
    "What the average of the weights answers, less the average of what the clients answer."
    return ask(weighted_mean(states, weights)) - sum(w * ask(s) for w, s in zip(weights, states))

def pair_gaps(
    ask: Callable[[State], Tensor], # A network with fixed gates
    start: State, # What the clients began with
    states: Sequence[State], # One a client
    weights: Sequence[float], # Shares of the clients, with sum 1
) -> dict[tuple[str, str], Tensor]: # By pair of blocks: what training both adds to the gaps of training either
    "The averaging gap of every block alone, and of every pair beyond that."
    def gap(*blocks): return gap_of(ask, [only(s, start, blocks) for s in states], weights)
    gaps = {(a, a): gap(a) for a in BLOCKS}
    for a, b in itertools.combinations(BLOCKS, 2): gaps[a, b] = gap(a, b) - gaps[a, a] - gaps[b, b]
    return gaps

def size(
    logits: Tensor, # (b, classes)
) -> float:
    "Root mean square length over images."
    return round(logits.square().sum(1).mean().sqrt().item(), 6)

def share(
    part: Tensor, # (b, classes)
    whole: Tensor, # (b, classes)
) -> float: # 1 for the whole itself, 0 for what stands at right angles to it
    "How much of `whole` lies in `part`."
    return round(((part * whole).sum() / whole.square().sum()).item(), 5)

def gap_parts(
    model: nn.Module, # The network of the round; a `DualCopy` has its own gates, a plain one those of its start
    start: State, # What the clients began the round with
    updates: Sequence[Update], # What they sent
    x: Tensor, # Images (b, c, h, w)
    pairs: bool, # Part the multilinear part further, by pairs of blocks?
) -> dict: # Sizes; shares of the gap, with sum 1; and how far each part reaches along the way that the ensemble moved
    "Where the averaging gap of a round comes from."
    states, total = [u.state for u in updates], sum(u.weight for u in updates)
    weights = [u.weight / total for u in updates]
    own, fixed = asking(model, x), model
    if not isinstance(model, DualCopy):
        own(start)
        begun = copy.deepcopy(model)
        begun.load_state_dict(start, strict=False)
        fixed = DualCopy(begun)
    linear = asking(fixed, x, (fixed.gates(x),))
    gap, multilinear = (gap_of(ask, states, weights) for ask in (own, linear))
    if fixed is model: multilinear = gap  # the same function, so no difference in the last bits either
    parts = {'crossing': gap - multilinear, 'multilinear': multilinear}
    if pairs:
        by_pair = pair_gaps(linear, start, states, weights)
        parts |= {f'{a} {b}': g for (a, b), g in by_pair.items()} | {'rest': multilinear - sum(by_pair.values())}
    moved = sum(w * own(s) for w, s in zip(weights, states)) - own(start)
    along = {k: share(parts[k], moved) for k in ('crossing', 'multilinear')}
    return {'gap': size(gap), 'moved': size(moved), 'sizes': {k: size(p) for k, p in parts.items()},
            'shares': {k: share(p, gap) for k, p in parts.items()}, 'along': along}

# --- one cell --------------------------------------------------------------------------------------------------------

def local_training(
    stage: Stage, # What the cells of this seed share
    settings: Settings, # What all cells share
    cell: Cell, # What is trained
) -> LocalTraining:
    "The clients."
    net, data = stage.start(cell.head), stage.splits.train
    labels, options = data.labels.numpy(), dict(seed=cell.seed)
    if cell.alpha: parts = dirichlet(labels, settings.clients, cell.alpha, min_size=settings.min_size, **options)
    else: parts = iid(labels, settings.clients, **options)
    gated = cell.method == 'fedsq'
    gates = stage.own_gates('train') if gated else None
    return LocalTraining(DualCopy(net) if gated else net, data, parts, stage.form, lr=cell.rate, epochs=cell.epochs,
                         batch_size=settings.batch, momentum=settings.momentum, stored_gates=gates,
                         memory_format=torch.channels_last, precision=PRECISIONS[settings.precision], seed=cell.seed,
                         device=stage.device)

def asked(
    stage: Stage, # What the cells of this seed share
    model: nn.Module, # The network of the cell
    state: State, # Weights to give it
    part: str, # 'valid' or 'test'
) -> tuple[Tensor, Tensor]: # Logits and labels
    "What a state of the model answers."
    trained_copy(model).load_state_dict(state, strict=False)
    gates = stage.own_gates(part) if isinstance(model, DualCopy) else None
    return answers(model, stage.batches(part, stored_gates=gates), stage.precision)

def measured(
    stage: Stage, # What the cells of this seed share
    settings: Settings, # What all cells share
    model: nn.Module, # The network of the cell
    start: State, # What the clients began the round with
    updates: Sequence[Update], # What they sent
    mean: State, # Their average
    pairs: bool, # Part the gap by pairs of blocks?
) -> dict: # Test accuracies of the average, the ensemble and the clients; the parts of the gap
    "A round's headroom."
    logits, labels = asked(stage, model, mean, 'test')
    clients = [asked(stage, model, mean | u.state, 'test')[0] for u in updates]
    ensemble = sum(u.weight * out for u, out in zip(updates, clients)) / sum(u.weight for u in updates)
    alone = [round(score(out, labels)[0], 4) for out in clients]
    averaged, together = score(logits, labels), score(ensemble, labels)
    right, also = logits.argmax(1) == labels, ensemble.argmax(1) == labels
    x = next(iter(stage.batches('valid', batch_size=settings.probe)))[0].to(memory_format=torch.channels_last)
    trained_copy(model).load_state_dict(start, strict=False)
    return {'test_averaged': averaged[0], 'test_averaged_loss': averaged[1],
            'test_ensemble': together[0], 'test_ensemble_loss': together[1],
            'only_averaged': int((right & ~also).sum()), 'only_ensemble': int((also & ~right).sum()),
            'test_clients': alone, 'gap': gap_parts(model, start, updates, x, pairs)}

def run(
    stage: Stage, # What the cells of this seed share
    settings: Settings, # What all cells share
    cell: Cell, # What to train
) -> list[dict]: # A row a round
    "Run one federation."
    rows, began, train = [], time.perf_counter(), local_training(stage, settings, cell)
    state = shared_state(train.model)
    for round_ in range(1, settings.rounds + 1):
        sent = [train(state, client, round_) for client in range(settings.clients)]
        updates, lost = screen_updates(sent, state, round=round_)
        row = {'round': round_, 'state': 'diverged' if lost else 'ok', 'lost': len(lost)}
        if lost: rows.append(row)
        if lost: break
        weights, losses = [u.weight for u in updates], [u.metrics['train_loss'] for u in updates]
        mean = weighted_mean([u.state for u in updates], weights)
        row['train_loss'] = round(float(np.average(losses, weights=weights)), 5)
        row['valid_accuracy'], row['valid_loss'] = score(*asked(stage, train.model, mean, 'valid'))
        row |= client_drift(updates, state)
        if round_ in settings.measured:
            pairs = round_ == settings.measured[0]
            row |= measured(stage, settings, train.model, state, updates, mean, pairs)
        rows.append(row | {'seconds': round(time.perf_counter() - began, 1)})
        state = mean
    return rows

# --- the study -------------------------------------------------------------------------------------------------------

def main() -> None:
    parser = study_parser(__doc__)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings, path, stage = Settings(precision=args.precision), args.out/'rows.jsonl', None
    source = {'data': Path(args.data).name, 'weights': state_hash(load_state(args.weights))}
    for cell in part_of(list(plan(args.seeds)), args.part):
        name = fingerprint(cell._asdict() | dataclasses.asdict(settings) | source)
        if name in stored(path): continue
        if stage is None or stage.seed != cell.seed:
            shape = settings.train, settings.valid, settings.size, settings.precision, args.device, settings.test
            stage = Stage(cell.seed, args.data, args.weights, *shape)
        rows = run(stage, settings, cell)
        rows[0]['settings'] = dataclasses.asdict(settings) | source | {'device': args.device, 'threads': args.threads}
        append_rows(path, [{'cell': name} | cell._asdict() | row for row in rows])
        shown = ('state', 'valid_accuracy', 'test_averaged', 'test_ensemble', 'seconds')
        print(*cell, *(rows[-1].get(k) for k in shown), flush=True)

if __name__ == '__main__': main()
