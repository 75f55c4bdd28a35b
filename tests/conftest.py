"One CPU thread for torch: the tensors here are so small that more threads only wait for each other."
import signal

import pytest
import torch

torch.set_num_threads(1)

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope='module')
def certificates(request):
    "A certificate takes a moment for each new network: modules that say CERTIFIES = True have them, the others ask by name."
    from fedsq_nb.gating.dualcopy import DualCopy
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, 'CERTIFIES', False): patch.setattr(DualCopy, 'certify_once', lambda self, x: None)
        yield
