"One client's day against plain PyTorch loops, and what of a model travels."
import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from fedsq_nb.server.aggregate import check_update
from fedsq_nb.client.backbones import backbone
from fedsq_nb.data.images import Format
from fedsq_nb.gating.cache import gate_cache
from fedsq_nb.core import InputError, copy_state, rng, seeded, state_hash
from fedsq_nb.data.batches import Augment, Batches
from fedsq_nb.data.images import from_arrays
from fedsq_nb.gating.dualcopy import DualCopy
from fedsq_nb.client.learner import Callback, FedProx, LocalTraining, constant_state, evaluate, one_epoch, shared_names, shared_state, trained_copy

FORM, gen = Format(1, (.5,), (.25,), 8), rng(0, 'test', 'learner')
DATA = from_arrays(gen.integers(0, 256, (50, 8, 8), dtype='uint8'), gen.integers(0, 3, 50), ['a', 'b', 'c'])
PARTS = [gen.permutation(50)[:33], gen.permutation(50)[:9], gen.permutation(50)[:17]]
LR, SETTINGS = .05, dict(lr=.05, epochs=2, batch_size=8, momentum=.9, seed=5)

def small(dropout=0.):
    with seeded(1, 'model'):
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(dropout),
                             nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))

def rescnn(bn): return backbone('rescnn', 3, weights='random', bn=bn, say=lambda m: None)
def day(model, callbacks=tuple, **kwargs): return LocalTraining(model, DATA, PARTS, FORM, callbacks=callbacks, **SETTINGS | kwargs)
def bits(state): return state_hash(state)

def by_hand(model, client, round, mu=0., weight_decay=0., epochs=2):
    "SGD with momentum written out, on a loss that contains the proximal term; returns the state."
    params = [p for p in model.parameters() if p.requires_grad]
    start, speed = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    batches = day(model).batches(client, round)
    model.train()
    for _ in range(epochs):
        for x, y in batches:
            loss = F.cross_entropy(model(x), y) + mu/2 * sum((p - s).square().sum() for p, s in zip(params, start))
            grads = torch.autograd.grad(loss + weight_decay/2 * sum(p.square().sum() for p in params), params)
            with torch.no_grad():
                for p, v, g in zip(params, speed, grads): p -= LR * v.mul_(.9).add_(g)
    return shared_state(model)

def close(a, b, atol=1e-6):
    assert a.keys() == b.keys()
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=0, atol=atol, msg=lambda m: f'{k}: {m}')

@pytest.mark.parametrize('wrap', [lambda m: m, DualCopy], ids=['plain', 'gated'])
@pytest.mark.parametrize('mu, weight_decay', [(0., 0.), (0., .1), (.1, 0.), (1., .05)])
def test_training_equals_a_loop_written_out(wrap, mu, weight_decay):
    start = shared_state(small())
    update = day(wrap(small()), (lambda: [FedProx(mu)]) if mu else tuple, weight_decay=weight_decay)(start, 0, 1)
    close(update.state, by_hand(wrap(small()), 0, 1, mu, weight_decay))
    assert (update.client, update.round, update.weight, update.metrics['steps']) == (0, 1, 33, 8)  # 8+8+8+9: one left over joins
    assert (update.state['0.weight'] - start['0.weight']).abs().max() > 1e-3
    if mu: assert (update.state['0.weight'] - by_hand(wrap(small()), 0, 1, 0., weight_decay)['0.weight']).abs().max() > 1e-4

def test_training_equals_torch_sgd_bit_for_bit():
    update, model = day(small(), weight_decay=.01)(shared_state(small()), 2, 4), small().train()
    opt, batches = torch.optim.SGD(model.parameters(), LR, momentum=.9, weight_decay=.01), day(model).batches(2, 4)
    losses = []
    for _ in range(2):
        for x, y in batches:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            losses += [loss.item()] * len(y)
    assert bits(update.state) == bits(shared_state(model))
    assert update.metrics['train_loss'] == pytest.approx(sum(losses) / len(losses)) and len(losses) == 2*17

@pytest.mark.parametrize('make', [lambda: small(.5), lambda: DualCopy(small(.5)), lambda: rescnn('frozen'), lambda: DualCopy(rescnn('train'))],
                         ids=['plain', 'gated', 'frozen', 'gated residual'])
def test_mu_zero_is_fedavg_bit_for_bit(make):
    start = shared_state(make())
    assert bits(day(make(), lambda: [FedProx(0.)])(start, 0, 1).state) == bits(day(make())(start, 0, 1).state)

@pytest.mark.parametrize('make', [lambda: small(.5), lambda: DualCopy(small(.5)), lambda: rescnn('train'), lambda: DualCopy(rescnn('train'))],
                         ids=['plain', 'gated', 'train', 'gated residual'])
@pytest.mark.parametrize('callbacks', [tuple, lambda: [FedProx(.5)]], ids=['sgd', 'prox'])
def test_a_day_depends_on_seed_client_and_round_alone(make, callbacks):
    start, fresh, used = shared_state(make()), day(make(), callbacks, augment=Augment(flip=True)), day(make(), callbacks, augment=Augment(flip=True))
    used(start, 0, 1); used(used(start, 2, 1).state, 0, 2)
    torch.rand(17)
    a, b = fresh(start, 1, 3), used(start, 1, 3)
    assert bits(a.state) == bits(b.state) and a.metrics['train_loss'] == b.metrics['train_loss']
    others = [fresh(start, 0, 3), fresh(start, 1, 4), day(make(), callbacks, augment=Augment(flip=True), seed=6)(start, 1, 3)]
    assert len({bits(u.state) for u in [a, *others]}) == 4

def test_dropout_follows_a_stream_of_its_own_for_each_seed_client_and_round(monkeypatch):
    start, paths = shared_state(small()), []
    def noted(seed, *path): paths.append((seed, *path)); return seeded(seed, *path)
    monkeypatch.setattr('fedsq_nb.client.learner.seeded', noted)
    for seed, client, round in ((5, 0, 1), (5, 1, 1), (5, 0, 2), (6, 0, 1)): day(small(.5), seed=seed)(start, client, round)
    assert len(paths) == len(set(paths)) == 4

def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    day(DualCopy(small(.5)), lambda: [FedProx(.1)], augment=Augment(flip=True, crop=1))(shared_state(small()), 0, 1)
    assert torch.equal(before, torch.get_rng_state())

@pytest.mark.parametrize('bn', ['frozen', 'train'])
def test_the_structural_copy_keeps_every_bit(bn):
    model = DualCopy(rescnn(bn))
    before, start = bits(model.structural.state_dict()), shared_state(model)
    train = day(model, lambda: [FedProx(.1)])
    state = train(train(start, 0, 1).state, 1, 2).state
    assert bits(model.structural.state_dict()) == before and bits(state) != bits(start)
    assert not any(m.training for m in model.structural.modules()) and all(p.grad is None for p in model.structural.parameters())

def test_dropout_works_in_the_quantitative_copy_alone():
    model, seen = DualCopy(small(.5)), {'structural': [], 'quantitative': []}
    for copy in seen:
        def look(m, x, y, copy=copy): seen[copy].append((m.training, bool(torch.equal(x[0], y))))
        getattr(model, copy)[5].register_forward_hook(look)
    day(model)(shared_state(model), 0, 1)
    assert len(seen['quantitative']) == len(seen['structural']) == 8
    assert set(seen['quantitative']) == {(True, False)} and set(seen['structural']) == {(False, True)}

def test_updates_share_no_memory_with_the_model_or_each_other():
    for make in (small, lambda: DualCopy(small())):
        model = make()
        train, start = day(model), shared_state(model)
        a = train(start, 0, 1)
        kept, sent = bits(a.state), bits(start)
        b = train(start, 1, 1)
        assert bits(a.state) == kept and bits(start) == sent
        places = [{t.untyped_storage().data_ptr() for t in s.values()} for s in (a.state, b.state, start, model.state_dict())]
        assert sum(map(len, places)) == len(set.union(*places))
        for t in b.state.values(): t.zero_()
        assert bits(shared_state(model)) != bits(b.state)

@pytest.mark.parametrize('wrap', [lambda m: m, DualCopy], ids=['plain', 'gated'])
@pytest.mark.parametrize('bn', ['frozen', 'train'])
def test_what_travels_each_round_and_what_once(wrap, bn):
    net = rescnn(bn)
    model = wrap(net)
    names, once = shared_names(model), constant_state(model)
    statistics = {n for n in net.state_dict() if n.split('.')[-1] in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert len(statistics) == 3*6
    assert set(names) == set(net.state_dict()) - (statistics if bn == 'frozen' else set())
    assert names == [n for n in net.state_dict() if n in names] and list(shared_state(model)) == names
    assert {n for n in once if not n.startswith('structural.')} == (statistics if bn == 'frozen' else set())
    structural = {f'structural.{n}' for n in model.structural.state_dict()} if wrap is DualCopy else set()
    assert {n for n in once if n.startswith('structural.')} == structural and not any('structural.fc' in n for n in once)

@pytest.mark.parametrize('wrap', [lambda m: m, DualCopy], ids=['plain', 'gated'])
def test_frozen_parameters_neither_change_nor_travel(wrap):
    net = rescnn('frozen')
    net.stem.requires_grad_(False)
    model = wrap(net)
    assert not any(n.startswith('stem.') for n in shared_names(model)) and 'blocks.0.conv1.weight' in shared_names(model)
    assert {'stem.0.weight', 'stem.1.weight', 'stem.1.bias'} <= constant_state(model).keys()
    before = copy_state(trained_copy(model).stem.state_dict())
    day(model, lambda: [FedProx(.1)], weight_decay=.1)(shared_state(model), 0, 1)
    assert bits(before) == bits(trained_copy(model).stem.state_dict())

@pytest.mark.parametrize('wrap', [lambda m: m, DualCopy], ids=['plain', 'gated'])
def test_batch_norm_statistics_move_under_one_policy_only(wrap):
    for bn, moves in (('frozen', False), ('train', True)):
        model = wrap(rescnn(bn))
        before = copy_state(trained_copy(model).state_dict())
        day(model)(shared_state(model), 0, 1)
        after = trained_copy(model).state_dict()
        for n in (n for n in before if 'running' in n): assert torch.equal(before[n], after[n]) != moves, n
        assert not torch.equal(before['stem.1.weight'], after['stem.1.weight'])  # scale and shift are trained under both

@pytest.mark.parametrize('wrap', [lambda m: m, DualCopy], ids=['plain', 'gated'])
def test_a_day_that_blows_up_ends_early_and_cannot_pass_the_server(wrap):
    model = wrap(small())
    start = shared_state(model)
    update = day(model, lr=1e25, epochs=50)(start, 0, 1)
    assert update.metrics['steps'] < 50*4 and 'finite' in check_update(update, start, round=1).reason
    assert bits(day(model)(start, 1, 1).state) == bits(day(wrap(small()))(start, 1, 1).state)  # and leaves nothing behind for the next client

def test_evaluate_by_its_definition_and_on_broken_weights():
    model, batch = small(.5), lambda n: Batches(DATA, FORM, batch_size=n)
    x, y = next(iter(batch(50)))
    pred = model.eval()(x)
    for n in (50, 7, 1):
        accuracy, loss = evaluate(model.train(), batch(n))
        assert accuracy == pytest.approx((pred.argmax(1) == y).double().mean().item())
        assert loss == pytest.approx(F.cross_entropy(pred, y).item(), abs=1e-6)
    for broken in (float('nan'), float('inf')):
        with torch.no_grad(): model[8].weight[0, 0] = broken
        assert all(v != v for v in evaluate(model, batch(50))) and all(v != v for v in evaluate(DualCopy(model), batch(50)))

# ---- stored gates

class Counted:
    "A store that counts what it is asked for."
    def __init__(self, cache): self.cache, self.asked = cache, []
    def fetch(self, image, picture):
        self.asked.append(len(image))
        return self.cache.fetch(image, picture)

@pytest.mark.parametrize('how', [None, Augment(flip=True), Augment(crop=1, flip=True, views=3)], ids=['as they are', 'flips', 'views'])
def test_a_day_with_stored_gates_asks_the_structural_copy_nothing(how):
    "And trains the same weights: a gate that another batch rounds to the other side belongs to a unit that is zero."
    model, ran = DualCopy(small(.5)), []
    all_images = Batches(DATA, FORM, batch_size=8, augment=how, draws=rng(0) if how else None)
    store, start = Counted(gate_cache(model.eval(), all_images)), shared_state(model)
    model.structural.get_submodule('0').register_forward_hook(lambda m, i, o: ran.append(len(i[0])))
    plain, stored = day(DualCopy(small(.5)), augment=how)(start, 0, 1), day(model, augment=how, stored_gates=store)(start, 0, 1)
    assert not ran and store.asked == [8, 8, 8, 9]*2 and bits(stored.state) != bits(start)
    close(stored.state, plain.state, 1e-5)
    assert stored.metrics['train_loss'] == pytest.approx(plain.metrics['train_loss'], abs=1e-5) and stored.metrics['steps'] == plain.metrics['steps'] == 8
    day(model, augment=how)(start, 0, 1)
    assert sum(ran) == 2*33

def test_evaluate_with_stored_gates():
    model, batches = DualCopy(small()), lambda gates=None: Batches(DATA, FORM, batch_size=10, stored_gates=gates)
    store = Counted(gate_cache(model.eval(), batches()))
    with torch.no_grad(): model.quantitative[6].weight.mul_(2)  # trained meanwhile
    assert evaluate(model, batches(store)) == evaluate(model, batches()) and store.asked == [10]*5
    store.cache.rows = store.cache.rows.roll(1, 0)  # another image's gates
    assert evaluate(model, batches(store))[1] != evaluate(model, batches())[1]


# -- the loop without callbacks is the Learner's, to the bit -----------------------------------------------------------

class Silent(Callback):
    "Hears everything and does nothing: with it the training runs in a `Learner`."

def drawn_training(draw):
    "Any sizes of images, clients and batches, so that rows begin anywhere in memory; any of the settings."
    channels, size, classes = draw(st.sampled_from([1, 3])), draw(st.integers(3, 9)), draw(st.integers(2, 4))
    n, batch_size = draw(st.integers(2, 40)), draw(st.integers(1, 12))
    gen = rng(draw(st.integers(0, 10**6)), 'learner')
    data = from_arrays(gen.integers(0, 256, (n, size + draw(st.integers(0, 2)), size, channels), dtype='uint8').squeeze(), gen.integers(0, classes, n), list('abcd')[:classes])
    form, parts = Format(channels, (.5,), (.25,), size), [gen.permutation(n), gen.permutation(n)[:1]]
    layers = [nn.Conv2d(channels, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()] if draw(st.booleans()) and batch_size > 1 else []
    with seeded(0, 'drawn'): net = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(draw(st.sampled_from([0., .5]))), nn.Linear(len(layers)*size**2 or channels*size**2, classes))
    settings = dict(lr=draw(st.sampled_from([.05, 1e30])), epochs=draw(st.integers(1, 3)), batch_size=batch_size, momentum=draw(st.sampled_from([0., .9])),
                    weight_decay=draw(st.sampled_from([0., .01])), stragglers=draw(st.sampled_from([0., 1.])), augment=draw(st.sampled_from([None, Augment(flip=True, crop=1)])))
    return net, data, parts, form, settings

@given(data=st.data(), wrap=st.booleans())
@settings(max_examples=40, deadline=None)
def test_without_callbacks_as_in_the_learner(data, wrap):
    net, images, parts, form, options = drawn_training(data.draw)
    if wrap: net = DualCopy(net)
    start, got = shared_state(net), []
    for callbacks in (tuple, lambda: [Silent()]):
        u = LocalTraining(net, images, parts, form, callbacks=callbacks, **options)(start, 0, 3)
        got.append((bits(u.state), repr({k: v for k, v in u.metrics.items() if k != 'seconds'})))
    assert got[0] == got[1]

def test_callbacks_that_come_and_go_meet_the_same_training():
    "A Learner that was used, or thrown away, before and between."
    train, start = day(small(.5)), shared_state(small())
    alone = bits(train(start, 0, 1).state)
    train.callbacks = lambda: [FedProx(.5)]
    sprung = bits(train(start, 0, 1).state)
    train.callbacks = tuple
    assert bits(train(start, 0, 1).state) == alone != sprung
    train.callbacks = lambda: [FedProx(.5)]
    assert bits(train(start, 0, 1).state) == sprung

def test_floats_made_at_once_are_bounded(monkeypatch):
    "A batch at a time beyond the limit, where images vary, and where gates are stored."
    made = []
    show = Batches.show
    def noted(self, index, how=None): made.append(len(index)); return show(self, index, how)
    monkeypatch.setattr(Batches, 'show', noted)
    def sizes(limit, **options):
        made.clear()
        x = torch.cat([x for x, *_ in one_epoch(Batches(DATA, FORM, PARTS[0], **{'batch_size': 8, 'shuffle': rng(0, 'order')} | options), limit)])
        assert len(x) == 33
        return list(made)
    floats = 33*8*8*4
    assert sizes(floats) == [33] and sizes(floats - 1) == [8, 8, 8, 9]
    assert sizes(floats, augment=Augment(flip=True), draws=rng(0)) == [8, 8, 8, 9]
    assert sizes(floats, shuffle=None) == [33]
    model = DualCopy(small())
    assert sizes(floats, stored_gates=gate_cache(model.eval(), Batches(DATA, FORM, batch_size=8)))[:4] == [8, 8, 8, 9]

def test_clients_images_are_checked_and_shared():
    train = LocalTraining(small(), DATA, [PARTS[0], [50]], FORM, lr=.1)
    with pytest.raises(InputError, match='index must be from 0 to 49'): train.batches(1, 1)
    a, b = train.batches(0, 1), train.batches(0, 2)
    assert a.images.data_ptr() == b.images.data_ptr() == DATA.images.data_ptr()
    assert not torch.equal(torch.cat([y for _, y in a]), torch.cat([y for _, y in b]))

@pytest.mark.parametrize('callbacks', [tuple, lambda: [FedProx(.1)]], ids=['without', 'with'])
def test_no_graph_is_kept_between_trainings(callbacks):
    "Neither what is sent nor what stays in memory remembers how it was computed."
    def graphs():
        gc.collect()
        tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        return sum(t.grad_fn is not None for t in tensors)
    train, start, before = day(small(), callbacks), shared_state(small()), graphs()
    updates = [train(start, client, round) for round in (1, 2) for client in (0, 1, 2)]
    assert graphs() == before and not any(t.requires_grad for u in updates for t in u.state.values())
