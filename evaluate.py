"""Evaluate a policy or a sweep: `python evaluate.py policy=<run or model folder>`."""

import sys
import traceback

from dpo_ref.cli import stopping

if __name__ == "__main__":
    stopping.end_at_once()

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dpo_ref.cli import command_line, schemas
from dpo_ref.files.writing import with_remedy
from dpo_ref.tracking.redaction import without_keys
from dpo_ref.tracking.terminal import guard_streams

schemas.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Generate, measure, score and report."""
    from dpo_ref.cli.evaluate import run_evaluation
    from dpo_ref.cli.ranks import SaidByFirst, evaluating
    from dpo_ref.distributed import on_device

    launched = HydraConfig.get()
    choices = {group: choice for group, choice in launched.runtime.choices.items() if choice is not None}
    try:
        with on_device(cfg.device), evaluating(cfg):
            run_evaluation(cfg, choices, list(launched.overrides.task))
    except SaidByFirst:
        sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {without_keys(str(with_remedy(error)))}")
    except Exception:
        sys.exit(without_keys(traceback.format_exc()))


if __name__ == "__main__":
    guard_streams()
    with stopping.in_one_line():
        sys.argv[1:] = command_line.checked(sys.argv[1:], "evaluate")
        main()
