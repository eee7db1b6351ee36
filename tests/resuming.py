"""A run that is saved to a file and resumed by new objects, compared with one that goes on."""

import io

import torch


def parts_through_file(*parts):
    """Return the states of model, schedule and optimizer as a file gives them back."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_resumes(make, run, until, more, spoil=None):
    """Assert that a run of a schedule resumes bit for bit, and return the schedules of both runs.

    make(): model, optimizer and schedule, as at the beginning. run(model, optimizer, steps) takes steps. It is saved
    before step `until`, and both go on for `more` steps. spoil(model, schedule) may ruin what the state has to bring.
    """
    model, optimizer, schedule = make()
    run(model, optimizer, range(until))
    states = parts_through_file(model, schedule, optimizer)
    other, resumed, its = make()
    if spoil is not None:
        spoil(other, its)
    for part, state in zip((other, its, resumed), states, strict=True):
        part.load_state_dict(state)
    assert (its.steps, its.skipped, its.mask) == (schedule.steps, schedule.skipped, schedule.mask)
    for its_model, its_optimizer in ((model, optimizer), (other, resumed)):
        run(its_model, its_optimizer, range(until, until + more))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name
    assert its.mask == schedule.mask
    return schedule, its
