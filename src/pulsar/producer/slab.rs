//! Values that are known by a number, which may be given to another when the value is removed.
//!
//! A removed value leaves an empty one in its place, so that reading by number costs what it costs in a vector. Whoever keeps numbers of values that
//! may be removed must be able to tell: see `forgetting` for each of them. The memory of the values themselves is
//! that of the most there were at a time; what they have allocated goes with them.

use std::ops::{Index, IndexMut};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Slab<T> {
    items: Vec<T>,
    free: Vec<usize>,
    /// How often a value was looked at by number.
    #[cfg(test)]
    looks: std::cell::Cell<usize>,
}

impl<T> Slab<T> {
    pub(super) fn new() -> Self {
        Self {
            items: Vec::new(),
            free: Vec::new(),
            #[cfg(test)]
            looks: std::cell::Cell::default(),
        }
    }

    /// How often a value was looked at since the last call.
    #[cfg(test)]
    pub(super) fn take_looks(&self) -> usize {
        self.looks.take()
    }

    /// How many values there are.
    pub(super) fn len(&self) -> usize {
        self.items.len() - self.free.len()
    }

    pub(super) fn get(&self, number: usize) -> Option<&T> {
        self.items.get(number)
    }

    /// Adds a value that is made for its number and for what the last one of that number has left.
    pub(super) fn insert(&mut self, make: impl FnOnce(usize, Option<&T>) -> T) -> usize {
        if let Some(number) = self.free.pop() {
            let item = make(number, Some(&self.items[number]));
            self.items[number] = item;
            number
        } else {
            let number = self.items.len();
            self.items.push(make(number, None));
            number
        }
    }

    /// Removes a value, and leaves an empty one.
    pub(super) fn remove(&mut self, number: usize, empty: T) -> T {
        self.free.push(number);
        std::mem::replace(&mut self.items[number], empty)
    }

    /// All of them, and the empty ones.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.items.iter_mut()
    }
}

impl<T> Index<usize> for Slab<T> {
    type Output = T;

    #[inline]
    fn index(&self, number: usize) -> &T {
        #[cfg(test)]
        self.looks.set(self.looks.get() + 1);
        &self.items[number]
    }
}

impl<T> IndexMut<usize> for Slab<T> {
    #[inline]
    fn index_mut(&mut self, number: usize) -> &mut T {
        #[cfg(test)]
        self.looks.set(self.looks.get() + 1);
        &mut self.items[number]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_given_again_only_when_its_value_was_removed() {
        let mut slab = Slab::new();
        let first = slab.insert(|number, left| {
            assert_eq!((number, left), (0, None));
            "first"
        });
        let second = slab.insert(|_, _| "second");
        assert_eq!((first, second, slab.len()), (0, 1, 2));

        assert_eq!(slab.remove(first, ""), "first");
        assert_eq!((slab.len(), slab[first], slab[second]), (1, "", "second"));
        let third = slab.insert(|number, left| {
            assert_eq!((number, left), (first, Some(&"")));
            "third"
        });
        assert_eq!((third, slab[third], slab.len()), (first, "third", 2));
    }
}
