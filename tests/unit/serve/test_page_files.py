"""The page without a browser: what it loads is there, no other host is asked, its policy holds, no word is missing."""

import re
from pathlib import Path

import pytest

import dougong.serve

WEB = Path(dougong.serve.__file__).parent / "web"
FILES = {path.name: path.read_text("utf-8") for path in WEB.iterdir()}


def test_every_file_is_served_as_what_it_is(server):
    for name, text in FILES.items():
        response = server.client.get(f"/{name}")
        assert response.status_code == 200 and response.text == text
    assert server.client.get("/").text == FILES["index.html"]
    kinds = {name: server.client.get(f"/{name}").headers["content-type"].split(";")[0] for name in FILES}
    assert kinds["chat.js"] == "text/javascript" and kinds["mark.svg"] == "image/svg+xml"


def test_an_unchanged_file_is_not_sent_again(server):
    tag = server.client.get("/chat.js").headers["etag"]
    assert server.client.get("/chat.js", headers={"if-none-match": tag}).status_code == 304


def test_all_that_is_loaded_is_there_and_nothing_lies_elsewhere():
    loaded = set(re.findall(r'(?:src|href)="([^"#]+)"', FILES["index.html"]))
    loaded |= {name[2:] for text in FILES.values() for name in re.findall(r'from "([^"]+)"', text)}
    assert loaded == set(FILES) - {"index.html"}
    for name, text in FILES.items():
        links = re.findall(r"https?://[^\s\"']+", text)
        assert all(link == "http://www.w3.org/2000/svg" for link in links), (name, links)


def test_the_policy_holds_for_the_page(server):
    policy = server.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"<script(?![^>]* src=)|\sstyle=|\son\w+=|<style", FILES["index.html"])
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", "".join(
        text for name, text in FILES.items() if name.endswith(".js")))   # a model's text is never markup


def test_every_word_has_both_languages_and_every_name_is_a_word():
    words = dict(re.findall(r'(\w+): \["((?:[^"\\]|\\.)*", "(?:[^"\\]|\\.)*)"\]', FILES["words.js"]))
    for name, both in words.items():
        english, chinese = both.split('", "')
        assert english and chinese
        assert sorted(re.findall(r"\{\w\}", english)) == sorted(re.findall(r"\{\w\}", chinese)), name
    used = set(re.findall(r'data-(?:word|label)="(\w+)"', FILES["index.html"]))
    scripts = "".join(text for name, text in FILES.items() if name.endswith(".js"))
    used |= set(re.findall(r'(?:word|button)\("(\w+)"', scripts)) | set(re.findall(r'"(k_\w+)"', scripts))
    whole = {name for name in used if not name.endswith("_")}
    assert len(whole) > 40 and whole <= set(words), whole - set(words)


@pytest.mark.parametrize("name", ["index.html"])
def test_what_the_scripts_look_for_is_in_the_page(name):
    held = set(re.findall(r'id="([\w-]+)"', FILES[name]))
    scripts = "".join(text for file, text in FILES.items() if file.endswith(".js"))
    sought = set(re.findall(r'(?:\bat|getElementById)\("([\w-]+)"\)', scripts))
    assert sought and sought <= held
