"""Chat templates: the same text as transformers renders, and every way to misbehave ends in an error."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lamina.errors import InvalidRequest, ModelFileError
from lamina.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "h\u00e9 <b>"}, {"role": "assistant", "content": " yes\n"}]


@pytest.fixture
def echo() -> Iterator[ChatTemplate]:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    yield template
    template.close()


def rendered(source: str, **variables: object) -> str:
    template = ChatTemplate(source)
    try:
        return template.render(MESSAGES, **variables)
    finally:
        template.close()


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {% if loop.first %}\n{{ m.role }}\n  {% endif %}\n{{ m['content'] }}\n{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content | trim }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ bos_token }}{% if add_generation_prompt %}go{% endif %}{{ missing }}",
        "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(messages[-1].content) }}{{ messages[1:] | length }}",
    ],
)
def test_the_text_is_that_of_transformers(source: str) -> None:
    variables = {"bos_token": "<s>", "add_generation_prompt": True}
    theirs, _ = render_jinja_template([MESSAGES], chat_template=source, **variables)
    assert rendered(source, **variables) == theirs[0]


def test_the_date_can_be_asked_for() -> None:
    assert rendered("{{ strftime_now('%Y') }}").isdigit()


@pytest.mark.fault("F26")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "within 2 s"),
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        (
            "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "memory|within 2 s",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}", "more than 4194304 characters"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{{ 'x'.__class__ }}", "'__class__' of a str"),
        ("{% if messages.__class__ %}{% endif %}", "'__class__' of a list"),
        ("{{ 'x' | attr('__class__') }}", "'__class__' of a str"),
        ("{{ '{0.__class__}'.format('x') }}", "'__class__' of a str"),
        ("{{ cycler.__init__.__globals__ }}", "'__init__'"),
        ("{{ messages.append(1) }}", "'append'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ oops", "TemplateSyntaxError"),
    ],
)
def test_misbehaviour_is_an_error(source: str, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        rendered(source)


def test_a_template_can_refuse_messages() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


def test_the_next_rendering_works_after_one_that_was_killed() -> None:
    template = ChatTemplate("{% set power = 10 ** (messages[0].content | int) %}ok")
    hang, fine = [{"role": "user", "content": "100000000"}], [{"role": "user", "content": "1"}]
    assert template.render(fine) == "ok"
    with pytest.raises(ModelFileError):
        template.render(hang)
    assert template.render(fine) == "ok"
    template.close()
    assert template.render(fine) == "ok"
    template.close()


def test_threads_get_their_own_answers(echo: ChatTemplate) -> None:
    texts = [f"{i} " * (i + 1) for i in range(50)]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda text: echo.render([{"role": "user", "content": text}]), texts)
        assert list(answers) == texts


def test_long_messages_pass_whole(echo: ChatTemplate) -> None:
    text = "é🎉x" * 300_000
    assert echo.render([{"role": "user", "content": text}]) == text
