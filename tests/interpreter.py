"""Triton's interpreter, without what it does again and again."""


def patch_at_launches_only():
    """A call of one kernel's function by another patches all of `triton.language` anew: most of the interpreter's time.

    The launch has done that already, but for `triton.language.core`, which stays patched after the first such call.
    """
    from triton.language import standard
    from triton.runtime import interpreter

    interpreter._patch_lang(standard.sum.fn)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
