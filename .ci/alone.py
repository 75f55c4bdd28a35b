"""Every notebook passes alone, in a process of its own, in any order: python .ci/alone.py [--threads N] [--seed S] [NAME...]

A whole run of `nbdev_test` can hide that a notebook needs another to have run before it in the same process. Here each
notebook gets a fresh process whose environment holds PATH, HOME and LANG and, if asked, a number of threads."""
import argparse, os, random, subprocess, sys, time
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent


def notebooks(names, seed):
    "All notebooks that nbdev runs, or those named, in an order drawn from `seed`."
    every = sorted(p for p in (TOP/'nbs').rglob('*.ipynb') if not {'.ipynb_checkpoints', '_proc'} & set(p.parts))
    chosen = [p for p in every if not names or p.stem in names]
    random.Random(seed).shuffle(chosen)
    return chosen


def passes(path, threads):
    "Run one notebook; what it said when it failed, else nothing."
    bare = {n: os.environ[n] for n in ('PATH', 'HOME', 'LANG') if n in os.environ}
    if threads: bare |= {'OMP_NUM_THREADS': str(threads)}
    program = Path(sys.executable).with_name('nbdev_test')
    command = [program, '--path', path, '--n_workers', '0', '--do_print']
    done = subprocess.run(command, cwd=TOP, env=bare, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ''


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', help='notebooks, without folder and ending; by default all')
    parser.add_argument('--threads', type=int, default=0, help='OMP_NUM_THREADS; 0 leaves it unset, so that all cores are used')
    parser.add_argument('--seed', type=int, default=0, help='of the order')
    args, failed = parser.parse_args(), []
    for path in notebooks(args.names, args.seed):
        began, said = time.perf_counter(), passes(path, args.threads)
        if said: failed.append(path.stem)
        print(f'{"FAILED" if said else "ok":7}{time.perf_counter() - began:6.1f} s  {path.stem}', flush=True)
        if said: print(said[-3000:], flush=True)
    print(f'{len(failed)} failed: {", ".join(failed)}' if failed else 'all passed')
    return bool(failed)


if __name__ == '__main__': sys.exit(main())
