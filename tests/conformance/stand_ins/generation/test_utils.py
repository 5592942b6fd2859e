"""Stand-in: the common tests only ask whether a tester of a text generator inherits this."""


class GenerationTesterMixin:
    pass
