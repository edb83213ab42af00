"""The commands, called in this process with options as a user types them."""

import html
import shutil

import torch
from tests.conftest import _configuration

from vessel.checkpoints.reading import find_checkpoint
from vessel.cli.options import typed
from vessel.data.preparation import PrepareOptions, prepare
from vessel.evaluation.command import evaluate
from vessel.evaluation.options import EvaluateOptions
from vessel.publishing.command import ExportOptions, export

COMMANDS = {
    "prepare": (PrepareOptions, prepare),
    "evaluate": (EvaluateOptions, evaluate),
    "export": (ExportOptions, export),
}


def vessel(verb, *options, default=()):
    """Call a command with options as a user types them, in this process."""
    schema, function = COMMANDS[verb]
    return function(typed(_configuration(verb, list(options)), schema, f"vessel.{verb}"), *default)


def score(run, *options, out):
    """Call `vessel.evaluate` on the CPU; it writes into `out`."""
    return vessel("evaluate", f"ckpt={run}", f"out={out}", f"run={out}", "device=cpu", *options, default=[out])


def changed(run, folder, edit):
    """Copy a run, with its checkpoint changed by `edit`."""
    shutil.copytree(run, folder)
    file = find_checkpoint(folder)
    checkpoint = torch.load(file, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, file)
    return folder


def texts(folder):
    """Read every text of a results folder, by its name."""
    return {file.name: html.unescape(file.read_text()) for file in folder.iterdir() if file.is_file()}
