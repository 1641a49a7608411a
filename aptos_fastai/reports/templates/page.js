// What the scripts of all pages use.

const byId = id => document.getElementById(id);

// Create an HTML element with properties and children; null is no child.
function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter(child => child != null));
  return node;
}
