"""Kill runs at random instants, go on with them, and compare every bit with a run that nobody disturbed.

    python tests/kill_runs.py --kills 1000

Each run is a short `fedsq compare`, with rates that are given or calibrated, in one process or with two workers. It is killed
by SIGKILL again and again, in the midst of its calibration as in the midst of its rounds, and gone on with by `--resume`, until
it ends. Then its rows, rates, weights and records must be those of the undisturbed run: all but the seconds that it took."""
import argparse, multiprocessing, os, shutil, signal, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch

import fedsq_nb.study.experiment  # loaded once, and inherited by every run
import fedsq_nb.study.report
from fedsq_nb.cli import main
from fedsq_nb.study.config import read_toml
from fedsq_nb.study.folder import RunFolder, check_files, chosen_rates, is_begun, read_lines

SHORT = ('--weights random --seeds 1 --rounds 3 --methods fedavg,fedsq --clients 3 --alpha 5 --min-size 2 --batch-size 8 '
         '--max-train 40 --test-fraction 0.05 --valid-fraction 0.05').split()
AUTO = '--lr auto --rates 0.01,0.03 --calibration-rounds 2 --calibration-seeds 1'.split()
KINDS = {'given rates': ['--lr', 'fedavg=0.02,fedsq=0.01', '--workers', '1'], 'calibrated': [*AUTO, '--workers', '1'],
         'calibrated, two workers': [*AUTO, '--workers', '2']}


def command(argv, log):
    sys.stdout = sys.stderr = open(log, 'a', buffering=1)
    torch.set_num_threads(1)
    fedsq_nb.study.report.report = lambda folder, **_: folder  # the page is drawn when all is done
    os._exit(main([str(a) for a in argv]))


def start(argv, log):
    "The command in a process of its own, with everything imported already."
    p = multiprocessing.get_context('fork').Process(target=command, args=(argv, log))
    p.start()
    return p


def record(folder):
    "All that two runs must have in common, by name."
    run = RunFolder(folder)
    check_files(folder)
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}
    for name in ('rounds.jsonl', 'config.toml', 'SHA256SUMS'): del found[name]
    found['rows'] = [{k: v for k, v in row.items() if not k.endswith('seconds')} for row in read_lines(run.rounds)]
    found['rates'] = chosen_rates(folder)
    found['settings'] = {k: v for k, v in read_toml(run.settings).items() if k != 'out'}
    return found


def killed_run(kind, folder, seconds, gen, most=12):
    "A run that is killed up to `most` times. Returns how often it was, and what was under way: 'calibration' or 'rounds'."
    log, where = folder.with_suffix('.log'), []
    for _ in range(most):
        begun = (folder/'config.toml').exists()
        p = start(['compare', '--resume', '--out', folder] if begun else ['compare', *SHORT, *KINDS[kind], '--resume', '--out', folder], log)
        p.join(gen.random()*seconds*.5)
        calibrating = not RunFolder(folder).rounds.exists() and kind != 'given rates'
        if p.exitcode is None: os.kill(p.pid, signal.SIGKILL)
        p.join()
        if p.exitcode == 0: return where
        if p.exitcode != -signal.SIGKILL: raise AssertionError(f'{kind}: ended with {p.exitcode}\n{log.read_text()}')
        where.append('calibration' if calibrating else 'rounds')
        if (folder/'config.toml').exists() and not is_begun(folder): return where  # killed after its end
    p = start(['compare', '--resume', '--out', folder] if (folder/'config.toml').exists() else ['compare', *SHORT, *KINDS[kind], '--out', folder], log)
    p.join(300)
    if p.exitcode != 0:
        p.kill()
        raise AssertionError(f'{kind}: ended with {p.exitcode}\n{log.read_text()}')
    return where


def kill_runs(kills, seed=0, say=print, top=None):
    "Kill that often. Returns how often runs were killed by what was under way, and the differences, one line each."
    top, gen = Path(top or tempfile.mkdtemp(prefix='kill_runs-')), np.random.default_rng(seed)
    whole, lasted, runs, began = {}, {}, 0, time.monotonic()
    counts, differ = {'calibration': 0, 'rounds': 0}, []
    for kind, argv in KINDS.items():
        for turn in range(2):  # the second one is timed: by then everything is loaded
            folder, before = top/f'{kind}-{turn}', time.monotonic()
            p = start(['compare', *SHORT, *argv, '--out', folder], top/f'{kind}.log')
            p.join()
            assert p.exitcode == 0, (top/f'{kind}.log').read_text()
            lasted[kind] = time.monotonic() - before
        whole[kind] = record(folder)
        if kind != 'given rates': assert whole[kind]['rates']
    while sum(counts.values()) < kills:
        kind = [*KINDS][runs % len(KINDS)]
        folder, runs = top/f'run-{runs}', runs + 1
        for where in killed_run(kind, folder, lasted[kind], gen): counts[where] += 1
        try: found = record(folder)
        except (ValueError, OSError, KeyError) as e: found = {'readable': str(e)}
        bad = [name for name in {**found, **whole[kind]} if found.get(name) != whole[kind].get(name) and name != 'settings']
        bad += [name for name in found.get('settings', {}) if found['settings'][name] != whole[kind]['settings'][name]]
        if bad: differ.append(f'{kind}, {folder}: {", ".join(bad)}')
        else: shutil.rmtree(folder)
        if runs % 10 == 0:
            say(f'{sum(counts.values())} kills ({counts["calibration"]} in a calibration) in {runs} runs, {len(differ)} differences, '
                f'{time.monotonic() - began:.0f} s')
    return counts, differ, runs


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=1000, help='how often to kill [1000]')
    parser.add_argument('--seed', type=int, default=0, help='of the instants [0]')
    args = parser.parse_args()
    counts, differ, runs = kill_runs(args.kills, args.seed, say=lambda text: print(text, flush=True))
    for line in differ: print('DIFFERS', line)
    print(f'{sum(counts.values())} kills ({counts["calibration"]} in a calibration) in {runs} runs, {len(differ)} differences')
    sys.exit(bool(differ))
