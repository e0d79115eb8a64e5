"""The data set of a recipe, its classes in the order in which weights know them."""

from collections.abc import Iterator
from dataclasses import replace

from diffkd.data.base import Data, build, builder
from diffkd.errors import UserError
from diffkd.models.weights import is_local, told_classes
from diffkd.names import options_of
from diffkd.pictures.progress import bars_shown
from diffkd.recipe.schema import ModelRecipe, Recipe, TeacherRecipe


def build_data(recipe: Recipe, *, unlabelled: bool = True) -> tuple[Recipe, Data]:
    """The data set that a recipe names, and the recipe with the order of classes that its weights say.

    Args:
        recipe: the run.
        unlabelled: False leaves out `data.unlabelled`, which need not be there then.

    Raises:
        UserError: it cannot be built, or a teacher knows its classes in an order that it cannot be given.
    """
    data = _built(recipe, unlabelled)
    for section, side, known in _told(recipe):
        if sorted(known) != sorted(data.class_names) or known == data.class_names:
            continue
        place = [a == b for a, b in zip(known, data.class_names, strict=True)].index(False)
        said = f"'{known[place]}' is class {place}, not '{data.class_names[place]}'"
        free = recipe.data.class_order is None
        if free and (ordered := _in_order(recipe, data, known, unlabelled)) is not None:
            recipe, data = ordered
            note = f"classes are in the order in which {section}.weights know them: {said}"
        elif isinstance(side, TeacherRecipe) and side.train is None:
            way = "bring the data's classes in that order" if free else "leave out data.class_order"
            raise UserError(f"{section}.weights know the classes in another order: {said}; {way}")
        else:
            note = f"{section}.weights knew the classes in another order: {said}"
        data = replace(data, notes=(*data.notes, note))
    return recipe, data


def _told(recipe: Recipe) -> Iterator[tuple[str, ModelRecipe, tuple[str, ...]]]:
    """Models whose weights say their classes; the teacher's count first."""
    models: list[tuple[str, ModelRecipe]] = [*recipe.every_teacher.items(), ("student", recipe.student)]
    for section, side in models:
        if side.weights is not None and is_local(side.weights):
            known = told_classes(side.weights)
            if known:
                yield section, side, known


def _in_order(
    recipe: Recipe, data: Data, classes: tuple[str, ...], unlabelled: bool
) -> tuple[Recipe, Data] | None:
    """Recipe and data with their classes in an order; None where the data set has its own."""
    if not ("class_order" in options_of(builder(recipe.data.name)) or data.takes_order):
        return None
    section = recipe.data.model_copy(update={"class_order": list(classes)})
    recipe = recipe.model_copy(update={"data": section})
    return recipe, _built(recipe, unlabelled)


def _built(recipe: Recipe, unlabelled: bool) -> Data:
    said = recipe.data
    with bars_shown(recipe.trainer.progress):
        return build(
            said.name,
            said.root,
            said.options,
            val_fraction=said.val_fraction,
            test_on=said.test_on,
            limit=said.limit,
            class_weights=said.class_weights,
            class_order=said.class_order,
            unlabelled=said.unlabelled if unlabelled else None,
        )
