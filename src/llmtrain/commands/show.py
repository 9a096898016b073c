"""`llmtrain show`: print what a stage's model will really see, what a run's has seen, or what a model costs."""

from rich.console import Console

from llmtrain.config.schema import ShowConfig
from llmtrain.engine.display import show_log


def run(config: ShowConfig) -> None:
    """Show rows of a stage or of a run, or a model. Raises what the stage would raise for its config or data.

    Each is imported alone: a model's size needs torch and no stage, which takes as long again.
    """
    show_log(is_main=True)
    console = Console()
    if config.model is not None:
        from llmtrain.commands.architecture import show_model

        show_model(config.model, config.overrides, console)
    else:
        from llmtrain.commands.rows import show_run, show_stage

        show_run(config, console) if config.run is not None else show_stage(config, console)
