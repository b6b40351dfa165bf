"""What the two commands do: schemas, resolve, build, run, report. The only room that knows Hydra."""
