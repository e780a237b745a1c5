"""`megazh recipe`: list the recipes, show one in full, check a file."""

import argparse

from megazh.cli.options import Subparsers, add_command

SHOW_EXAMPLES = """examples:
  megazh recipe show qwen0.5b_6x3090
  megazh recipe show mine.yaml learning_rate=3e-4 schedule.steps=20

Settings are key=value; the last name of a key is enough where no other section has it."""


def add_to(commands: Subparsers) -> None:
    """Add `recipe` and its commands."""
    parser = commands.add_parser("recipe", help="list, show and check recipes")
    below = parser.add_subparsers(metavar="COMMAND", required=True)
    names = add_command(below, "list", "list the recipes that come with megazh", "example:\n  megazh recipe list")
    names.set_defaults(call=_list)
    show = add_command(
        below,
        "show",
        "print a whole recipe: every key, its meaning, its value, and where the value was written",
        SHOW_EXAMPLES,
    )
    show.add_argument("recipe", metavar="RECIPE", help="a name in jobs/recipes/, or the path of a .yaml file")
    show.usage = "%(prog)s RECIPE [key=value ...]"
    show.set_defaults(settings=[], call=_show)
    check = add_command(
        below,
        "check",
        "check recipe files: known keys, right types, a batch, stages and a warm-up that work",
        "examples:\n  megazh recipe check mine.yaml\n  megazh recipe check mine.yaml steps=20",
    )
    check.add_argument("recipe", metavar="FILE", nargs="+", help="the path of a .yaml file, or a name in jobs/recipes/")
    check.usage = "%(prog)s FILE [FILE ...] [key=value ...]"
    check.set_defaults(call=_check)


def _list(options: argparse.Namespace) -> None:
    from megazh.training.recipe_files import recipe_names, recipe_title

    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {recipe_title(name)}")


def _show(options: argparse.Namespace) -> None:
    from megazh.training.recipe_files import recipe_path
    from megazh.training.recipe_text import recipe_text

    for line in recipe_text(recipe_path(options.recipe), options.settings):
        print(line)


def _check(options: argparse.Namespace) -> None:
    from megazh.errors import Collector, UsageError
    from megazh.training.preflight import check_recipe
    from megazh.training.recipe import read_recipe
    from megazh.training.recipe_files import recipe_path

    settings = [word for word in options.recipe if "=" in word]
    names = [word for word in options.recipe if word not in settings]
    if not names:
        raise UsageError("megazh recipe check: give the path of a .yaml file, or a name from 'megazh recipe list'")
    found = Collector()
    for name in names:
        with found.collecting():
            path = recipe_path(name)
            recipe, written = read_recipe(path, settings)
            check_recipe(recipe, written, path)
            course = recipe.course
            sizes = " or ".join(f"{size * recipe.batch.seq_len:,}" for size in course.sizes())
            print(f"{path}: a recipe of {course.steps:,} steps x {sizes} tokens")
    found.raise_all()
