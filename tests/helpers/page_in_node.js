// A page's scripts in Node, over as much of a document as they use; prints what the scenario returns, as JSON.
// Arguments: file of the page's tree [tag, attributes, children] from pages.py, file of the scenario's body.
"use strict";
const fs = require("fs");
const vm = require("vm");

class Node {
  constructor(tag) {
    this.tagName = tag;
    this.attributes = {};
    this.children = [];
    this.parent = null;
    this.listeners = {};
    this.value = "";
  }
  append(...children) {
    children.forEach((child) => {
      if (child instanceof Node && child.parent) child.parent.children = child.parent.children.filter((one) => one !== child);
      if (child instanceof Node) child.parent = this;
      this.children.push(child);
    });
  }
  replaceChildren(...children) {
    this.children.forEach((child) => { if (child instanceof Node) child.parent = null; });
    this.children = [];
    this.append(...children);
  }
  setAttribute(name, value) {
    this.attributes[name] = String(value);
    if (name === "value") this.value = String(value);
  }
  removeAttribute(name) { delete this.attributes[name]; }
  getAttribute(name) { return name in this.attributes ? this.attributes[name] : null; }
  get hidden() { return "hidden" in this.attributes; }
  set hidden(value) { if (value) this.attributes.hidden = ""; else delete this.attributes.hidden; }
  get textContent() { return this.children.map((child) => (child instanceof Node ? child.textContent : child)).join(""); }
  set textContent(text) { this.replaceChildren(String(text)); }
  all(tag) { return this.children.flatMap((one) => (one instanceof Node ? [...(one.tagName === tag.toUpperCase() ? [one] : []), ...one.all(tag)] : [])); }
  querySelector(tag) { return this.all(tag)[0] || null; }
  find(id) {
    if (this.attributes.id === id) return this;
    for (const child of this.children) {
      const found = child instanceof Node ? child.find(id) : null;
      if (found) return found;
    }
    return null;
  }
  focus() { document.activeElement = this; }
  addEventListener(name, act) { (this.listeners[name] = this.listeners[name] || []).push(act); }
  send(name, more = {}) {
    const event = { target: this, preventDefault() {}, ...more };
    (this.listeners[name] || []).forEach((act) => act(event));
  }
  click() { if (!this.disabled) this.send("click"); }
}

function built([tag, attributes, children]) {
  const node = new Node(tag.toUpperCase());
  Object.entries(attributes).forEach(([name, value]) => node.setAttribute(name, value === null ? "" : value));
  node.append(...children.map((child) => (typeof child === "string" ? child : built(child))));
  return node;
}

const root = built(JSON.parse(fs.readFileSync(process.argv[2], "utf8")));
const document = new Node("#document");
document.append(root);
document.getElementById = (id) => root.find(id);
document.createElement = (tag) => new Node(tag.toUpperCase());
document.createElementNS = (space, tag) => new Node(tag.toUpperCase());
document.title = root.all("title")[0].textContent;
const window = new Node("#window");
window.scrollTo = () => {};
let hash = "";
const location = {
  get hash() { return hash; },
  set hash(value) { hash = value; window.send("hashchange"); },
};
// Nothing of a network is here: a script that asked for it would fail.
const context = vm.createContext({ document, window, location, Intl });
root.all("script").filter((script) => !script.getAttribute("type")).forEach((script) => vm.runInContext(script.textContent, context));
context.key = (name, more = {}) => document.send("keydown", { key: name, target: new Node("BODY"), ...more });
context.rows = () => root.find("rows").children.filter((row) => !row.hidden).map((row) => row.querySelector("a").textContent);
const scenario = fs.readFileSync(process.argv[3], "utf8");
process.stdout.write(JSON.stringify(vm.runInContext(`(() => {${scenario}})()`, context)));
